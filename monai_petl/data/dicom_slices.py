"""The slices of a DICOM series: what each header says of its place, and whether together they make a straight grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from monai_petl.data.errors import DataError

__all__ = ["MODALITY", "Slice", "read_header", "read_slice", "require_straight", "thickness"]

MODALITY, PATIENT, PHOTOMETRY, FRAMES = "0008|0060", "0010|0020", "0028|0004", "0028|0008"
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
SLICE_DISTANCE, SLICE_THICKNESS = "0018|0088", "0018|0050"
NO_VOLUMES = ("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO")
CONVERT = "Convert the series with dcm2niix, and use the NIfTI file that it writes"
MOST_ASKEW = 0.05  # of a pixel, over all slices; 0.05 mm at least, since positions and directions are rounded decimals
MOST_UNEVEN = 0.05  # of the distance of two slices; 0.02 mm at least


@dataclass(frozen=True)
class Slice:
    """What the header of a file says of its place: mm in DICOM's axes (left, back, head)."""

    name: str
    origin: np.ndarray
    axes: np.ndarray  # columns of unit length: along rows, along columns, normal
    spacing: tuple[float, float]  # from column to column, from row to row
    size: tuple[int, ...]
    kind: int  # SimpleITK's number of the type that holds the rescaled values
    same: tuple[str, ...]  # what all slices of a volume share: patient and photometric interpretation


def read_header(name: str) -> sitk.ImageFileReader:
    """A reader that has read the header of a DICOM file.

    Raises:
        DataError: to follow the folder's name.
    """
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(name)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise DataError(
            f"holds {Path(name).name}, which cannot be read: {last}. Copy it again from its source"
        ) from error
    return reader


def read_slice(name: str) -> Slice:
    """What the header of a file says.

    Raises:
        DataError: to follow the folder's name: the file is no image of one value a pixel, holds many slices, or does not say
            where it lies.
    """
    reader, file = read_header(name), Path(name).name
    modality = _text(reader, MODALITY)
    if modality in NO_VOLUMES:
        raise DataError(
            f"is no series of images: {file} is a DICOM object of modality {modality}. Convert a segmentation to "
            "NIfTI first, with dcmqi for instance"
        )
    if reader.GetNumberOfComponents() != 1:
        raise DataError(f"holds colours ({file}), where a volume has one number a voxel. Export it in grey values")
    frames = _numbers(reader, FRAMES)
    if len(frames) and frames[0] > 1:
        raise DataError(
            f"holds many slices in one file ({file}, {frames[0]:g} frames), whose places are not read one by one. {CONVERT}"
        )
    spacing = _numbers(reader, PIXEL_SPACING)
    if len(spacing) != 2 or not (spacing > 0).all():
        raise _without("pixel spacing (0028,0030)", file, spacing)
    origin = _numbers(reader, POSITION)
    if len(origin) != 3:
        raise _without("position (0020,0032)", file, origin)
    turned = _numbers(reader, ORIENTATION)
    axes = turned.reshape(2, 3) if len(turned) == 6 else np.zeros((2, 3))
    if np.abs(axes @ axes.T - np.eye(2)).max() > 1e-3:
        raise _without("orientation (0020,0037) of two unit vectors at right angles", file, turned)
    along, across = (axis / np.linalg.norm(axis) for axis in axes)
    normal = np.cross(along, across)
    return Slice(
        file,
        origin,
        np.stack([along, across, normal / np.linalg.norm(normal)], axis=1),
        (float(spacing[1]), float(spacing[0])),
        tuple(reader.GetSize()[:2]),
        reader.GetPixelID(),
        (_text(reader, PATIENT), _text(reader, PHOTOMETRY)),
    )


def thickness(name: str) -> float:
    """The extent of a single slice along its normal, in mm: its thickness, else its distance to the next.

    Raises:
        DataError: to follow the folder's name: the header gives neither.
    """
    reader = read_header(name)
    for tag in (SLICE_THICKNESS, SLICE_DISTANCE):
        found = _numbers(reader, tag)
        if len(found) == 1 and found[0] > 0:
            return float(found[0])
    raise _without("slice thickness (0018,0050)", Path(name).name, np.array([]))


def require_straight(slices: Sequence[Slice]) -> np.ndarray:
    """The way from a slice to the next in mm, if all are alike and lie straight above each other at equal distances.

    Raises:
        DataError: to follow the folder's name.
    """
    first = slices[0]
    for other in slices[1:]:
        _require_alike(first, other)
    places = np.array([item.origin for item in slices]) - first.origin
    heights = places @ first.axes[:, 2]
    gaps = np.abs(np.diff(heights))
    if gaps.min() <= 1e-3:
        place = int(gaps.argmin())
        raise DataError(
            f"has two slices in one place: {slices[place].name} and {slices[place + 1].name}. Remove copies, and give each "
            "phase or echo a folder of its own"
        )
    drift = float(np.linalg.norm(places - heights[:, None] * first.axes[:, 2], axis=1).max())
    if drift > max(MOST_ASKEW * min(first.spacing), 0.05):
        angle = np.degrees(np.arctan2(drift, np.abs(heights).max()))
        raise DataError(
            f"lies askew by {angle:.3g} degrees (gantry tilt): slices are shifted in their plane by up to {drift:.3g} mm "
            f"against the first, and a straight grid would put them in wrong places. {CONVERT}: it straightens the slices"
        )
    distance = heights[-1] / (len(slices) - 1)
    off = np.abs(heights - distance * np.arange(len(slices))).max()
    if max(gaps.max() - gaps.min(), float(off)) > max(MOST_UNEVEN * gaps.max(), 0.02):
        raise DataError(
            f"lacks slices or has uneven ones: they lie {gaps.min():.3g} to {gaps.max():.3g} mm apart. Complete the series, or "
            "resample it with a tool that knows the distances"
        )
    return first.axes[:, 2] * distance


def _require_alike(first: Slice, other: Slice) -> None:
    if other.size != first.size or np.abs(np.subtract(other.spacing, first.spacing)).max() > 1e-4:
        raise DataError(
            f"mixes slices: {first.name} has {first.size} pixels of {first.spacing} mm, {other.name} {other.size} of "
            f"{other.spacing}. Give each kind a folder of its own"
        )
    if np.abs(other.axes - first.axes).max() > 1e-3:
        raise DataError(
            f"mixes directions: {first.name} and {other.name} are turned against each other. Give each direction a folder "
            "of its own"
        )
    for what, mine, its in zip(("patients", "kinds of grey values"), first.same, other.same, strict=True):
        if mine != its:
            raise DataError(
                f"mixes {what}: {first.name} says {mine!r}, {other.name} {its!r}. Give each a folder of its own"
            )


def _text(reader: sitk.ImageFileReader, tag: str) -> str:
    return reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""


def _numbers(reader: sitk.ImageFileReader, tag: str) -> np.ndarray:
    """The numbers of a field; none where it is missing, or one of them is not finite."""
    try:
        values = np.array([float(part) for part in _text(reader, tag).split("\\")])
    except ValueError:
        return np.array([])
    return values if np.isfinite(values).all() else np.array([])


def _without(what: str, file: str, found: np.ndarray) -> DataError:
    said = f" ({' '.join(f'{value:g}' for value in found)} is none)" if len(found) else ""
    return DataError(
        f"does not say where its slices lie: {file} has no {what}{said}. Export the series again from its archive"
    )
