"""Radiographs and other single pictures in DICOM, as a viewer shows them.

Rows are first. Rescale slope and intercept are applied, then the first VOI window (DICOM PS3.3, C.11.2.1.2: LINEAR,
LINEAR_EXACT, SIGMOID). Without a window, black and white are the ends of the stored bits. MONOCHROME1 is inverted. Where a
file has both a window and a VOI table, the window counts; tables alone are refused, since SimpleITK does not give them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from monai_petl.data.errors import DataError

__all__ = ["read_dicom_picture"]

PHOTOMETRIC, BITS, HIGH_BIT, SIGNED = "0028|0004", "0028|0101", "0028|0102", "0028|0103"
CENTER, WIDTH, FUNCTION = "0028|1050", "0028|1051", "0028|1056"
INTERCEPT, SLOPE = "0028|1052", "0028|1053"
VOI_TABLE, OTHER_TABLES = (
    {0x00283010: "VOI LUT Sequence"},
    {0x00283000: "Modality LUT Sequence", 0x20500010: "Presentation LUT Sequence"},
)
PIXELS = 0x7FE00010
TWELVE_BITS = 4096


def read_dicom_picture(path: Path) -> NDArray[np.generic]:
    """Reads a DICOM file of one picture as (H, W) float32 or (H, W, 3) uint8, from 0 to 255.

    Raises:
        DataError: to follow the file's name: it cannot be read, has several frames, a table of grey values in place of a
            window or slope, or bits of which nothing says which are black and white.
    """
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        image = reader.Execute()
    except RuntimeError as error:
        reason = re.sub(r"^.*\(0x[0-9a-f]+\): ", "", str(error).strip().splitlines()[-1].strip())
        raise DataError(f"cannot be read as a DICOM picture: {reason}") from None
    values = sitk.GetArrayFromImage(image)
    colours = image.GetNumberOfComponentsPerPixel()
    if image.GetDimension() == 3:
        if len(values) > 1:
            raise DataError(
                f"has {len(values)} frames, where one picture is wanted. Save the one that is meant as a file of its own"
            )
        values = values[0]
    if colours == 3:
        return _bytes(values)
    if colours != 1:
        raise DataError(f"has {colours} values a pixel, where a picture has 1 or 3")
    tags = {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
    inverted = tags.get(PHOTOMETRIC) == "MONOCHROME1"
    window, (low, high) = _window(tags), _stored_range(tags)
    _refuse_tables(path, OTHER_TABLES if window else {**OTHER_TABLES, **VOI_TABLE})
    stored = values.astype(np.float64)
    if inverted:  # GDCM has turned the stored values round, and the window is meant for them as they were
        stored = low + high - stored
    if window is None:
        if int(tags.get(BITS) or 16) > 12:
            _require_contrast(stored, low, high)
        grey = (stored - low) / (high - low)
    else:
        grey = _shown(stored, *window)
    grey = np.clip(grey, 0, 1)
    return (255 * (1 - grey if inverted else grey)).astype(np.float32)


def _shown(values: NDArray[np.float64], center: float, width: float, function: str) -> NDArray[np.float64]:
    """Stored values after rescaling -> 0 (black) to 1 (white), PS3.3 C.11.2.1.2."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR_EXACT":
        return (values - center) / width + 0.5
    if width == 1:
        return (values > center - 0.5).astype(np.float64)
    return (values - (center - 0.5)) / (width - 1) + 0.5


def _window(tags: dict[str, str]) -> tuple[float, float, str] | None:
    """The first window and its function."""
    if not tags.get(CENTER) or not tags.get(WIDTH):
        return None
    try:
        center, width = (float(tags[key].split("\\")[0]) for key in (CENTER, WIDTH))
    except ValueError:
        raise DataError(f"has a window that is no number: center {tags[CENTER]!r}, width {tags[WIDTH]!r}") from None
    function = tags.get(FUNCTION) or "LINEAR"
    if width <= 0 or (function == "LINEAR" and width < 1) or function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise DataError(f"has a window that means nothing: center {center:g}, width {width:g}, function {function}")
    return center, width, function


def _stored_range(tags: dict[str, str]) -> tuple[float, float]:
    """The least and the greatest value that the stored bits can hold, after rescaling."""
    bits, slope = int(tags.get(BITS) or 16), float(tags.get(SLOPE) or 1)
    if int(tags.get(HIGH_BIT) or bits - 1) != bits - 1:
        raise DataError(
            f"has its {bits} bits in an unusual place (high bit {tags[HIGH_BIT]}), which is not understood. Export it as PNG "
            "from a viewer"
        )
    if slope == 0:
        raise DataError(
            "has the rescale slope 0, which makes all pixels equal. Correct it, or export it as PNG from a viewer"
        )
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if tags.get(SIGNED) == "1" else [0, 2**bits - 1], float)
    low, high = np.sort(ends * slope + float(tags.get(INTERCEPT) or 0))
    return float(low), float(high)


def _require_contrast(values: NDArray[np.float64], low: float, high: float) -> None:
    """12 bits in 16 without a window are nearly of one grey."""
    least, most = values.min(), values.max()
    if (most - least) * 65536 < TWELVE_BITS * (high - low):
        raise DataError(
            f"has no window, and values from {least:g} to {most:g} of the {low:g} to {high:g} that its bits can hold: shown as "
            "it is, it is nearly of one grey. Export it as PNG from a viewer"
        )


def _refuse_tables(path: Path, tables: dict[int, str]) -> None:
    """SimpleITK does not tell tables of grey values, so their tags are looked for in front of the pixels."""
    data = path.read_bytes()
    orders: tuple[Literal["little", "big"], ...] = ("little", "big")
    for order in orders:
        head = data.partition(_tag(PIXELS, order))[0]
        for tag, name in tables.items():
            if len(head) < len(data) and _tag(tag, order) in head:
                raise DataError(f"has a {name}, which is not applied. Export it as PNG from a viewer")


def _tag(number: int, order: Literal["little", "big"]) -> bytes:
    return (number >> 16).to_bytes(2, order) + (number & 0xFFFF).to_bytes(2, order)


def _bytes(values: NDArray[np.generic]) -> NDArray[np.generic]:
    if values.dtype != np.uint8:
        raise DataError(f"has colours of {values.dtype}, where 8 bits are understood. Export it as PNG from a viewer")
    return values
