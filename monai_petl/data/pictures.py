"""Pictures as a person sees them: every mode of Pillow as grey or colours from 0 to 255, upright.

8-bit pictures become what Pillow's ``convert`` gives: ``L`` for grey and black-and-white, ``RGB`` for palettes, CMYK, LAB and
all else; transparency is left out. 16-bit grey counts from 0 (black) to 65535 (white), 12-bit TIFF to 4095, floats from 0 to
1. Of colours with 16 bits Pillow keeps the upper 8. Anything else is refused, since nothing in the file says what is white.
Orientation is EXIF's, in every format.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from monai_petl.data.dicom_picture import read_dicom_picture
from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.folders import VOLUME_ENDINGS, ending_of
from monai_petl.data.volume_files import open_volume
from monai_petl.data.volumes import array_of

__all__ = ["IMAGE_ENDINGS", "is_image", "is_picture", "read_picture"]

PICTURES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif"),
    *(".jp2", ".j2k", ".pgm", ".ppm", ".pnm"),
)
DICOM = (".dcm", ".dicom")
IMAGE_ENDINGS = (*PICTURES, *DICOM, ".npy", *VOLUME_ENDINGS)
BITS, PHOTOMETRIC = 258, 262  # TIFF's tags; of the latter 0: white is zero
TWELVE_BITS = 4096
PNG_BITS = slice(24, 26)  # bits a sample, and the kind of samples
ONE_OF_SEVERAL = ("MPO",)  # phones keep previews behind the picture itself


def is_image(path: PathLike) -> bool:
    """Whether the name ends like an image's, in upper or lower case."""
    return str(path).lower().endswith(IMAGE_ENDINGS)


def is_picture(path: PathLike) -> bool:
    """Whether it is a picture, and no array or volume."""
    return str(path).lower().endswith((*PICTURES, *DICOM))


def read_picture(path: PathLike) -> NDArray[np.generic]:
    """Reads an image as (H, W) or (H, W, 3), rows first: uint8, or float32 from 0 to 255 where the file has more bits.

    Arrays (``.npy``) and volumes of one slice are given as they are stored, in their own range.

    Raises:
        DataError: to follow the file's name: it cannot be read, or nothing says what is black and white in it.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.is_file():
        raise DataError("is missing")
    if name.endswith(DICOM):
        return read_dicom_picture(path)
    if name.endswith(".npy"):
        return _array(path)
    if ending_of(path):
        volume = array_of(open_volume(path))
        return volume[:, :, 0] if volume.shape[2] == 1 else volume
    try:
        data = path.read_bytes()  # Pillow maps files otherwise, and turned TIFFs with wrong rows
        with Image.open(io.BytesIO(data)) as picture:
            return _pixels(picture, _sample_bits(picture, data))
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(
            f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, which Pillow refuses to unpack. Save a smaller copy"
        ) from None
    except Exception as error:  # Pillow raises whatever its decoders do
        raise DataError(f"cannot be read: {str(error) or type(error).__name__}".split(" <_io")[0]) from None


def _sample_bits(picture: Image.Image, data: bytes) -> int:
    """Bits of a sample as the file has them; 0 where its format does not say. Pillow's mode tells them for grey alone."""
    if picture.format == "PNG":
        return data[PNG_BITS][0]
    if picture.format == "TIFF":
        return max(dict(getattr(picture, "tag_v2", {})).get(BITS, (1,)))
    return 0


def _pixels(picture: Image.Image, bits: int) -> NDArray[np.generic]:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format not in ONE_OF_SEVERAL:
        raise DataError(
            f"holds {frames} pictures (an animation, or several pages). Save the one that is meant as a file of its own"
        )
    white_is_zero = picture.format == "TIFF" and dict(getattr(picture, "tag_v2", {})).get(PHOTOMETRIC) == 0
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):
        return _sixteen_bits(np.asarray(picture), picture.mode, 4095 if bits == 12 else 65535, white_is_zero)
    if picture.mode == "F":
        return _floats(np.asarray(picture), white_is_zero)
    mode = "L" if picture.mode in ("1", "L", "LA", "La") else "RGB"
    pixels = np.asarray(
        picture if picture.mode == mode else picture.convert(mode)
    )  # convert copies what is right as well
    if bits == 16 and pixels.max() < TWELVE_BITS // 256:
        raise DataError(_nearly_black(256 * int(pixels.max()) + 255))
    return pixels


def _sixteen_bits(values: NDArray[np.generic], mode: str, white: int, white_is_zero: bool) -> NDArray[np.generic]:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > white:
        raise DataError(
            f"has whole numbers from {low} to {high} as grey values ({mode}), and nothing says which are black and white. "
            "Save it with 8 or 16 bits"
        )
    shown = white - values.astype(np.int64) if white_is_zero else values
    for used in (high, int(shown.max())):
        if white >= 65535 and used < TWELVE_BITS:
            raise DataError(_nearly_black(used))
    return shown.astype(np.float32) / np.float32(white / 255)


def _nearly_black(high: int) -> str:
    return (
        f"has 16 bits, of which at most 12 are used (its largest value is {high}): shown as it is, it is nearly black. "
        "Scale its values to 0 to 65535, or save it with 8 bits"
    )


def _floats(values: NDArray[np.generic], white_is_zero: bool) -> NDArray[np.generic]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN is among them
        raise DataError(
            f"has fractions from {low:g} to {high:g} as grey values, where 0 (black) to 1 (white) is understood. Scale them, "
            "or save it with 8 or 16 bits"
        )
    scaled = values.astype(np.float32) * 255
    return 255 - scaled if white_is_zero else scaled


def _array(path: Path) -> NDArray[np.generic]:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)  # compares the file's size with what it announces
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot be read: {error}") from None
    if not isinstance(values, np.ndarray):
        raise DataError("holds several arrays (.npz), where a .npy file has one. Save the image alone with numpy.save")
    if values.dtype.kind not in "biuf":
        raise DataError(f"holds {values.dtype}, where an image has numbers. Save it as numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError("has values that are no finite numbers (NaN or infinity). Replace them")
    return np.array(values)
