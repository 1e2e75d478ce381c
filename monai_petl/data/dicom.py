"""DICOM series as volumes: the slices of a folder in order, if they make a straight grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.geometry import sitk_affine

__all__ = ["modality_of", "read_series", "series_files", "series_ids"]

MODALITY = "0008|0060"
NO_VOLUMES = ("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO")
STRAIGHTEN = "Convert the series with dcm2niix, which straightens it, and use the NIfTI file that it writes"


@dataclass(frozen=True)
class _Slice:
    """What the header of a file says of its place: mm in DICOM's axes (left, back, head)."""

    name: str
    origin: np.ndarray
    axes: np.ndarray  # columns: along rows, along columns, normal
    spacing: tuple[float, ...]
    size: tuple[int, ...]


def series_ids(folder: PathLike) -> tuple[str, ...]:
    """The DICOM series of a folder, without those below it."""
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesIDs(os.fspath(folder)))


def series_files(folder: PathLike) -> tuple[str, ...]:
    """The files of the one series in a folder, in the order of their places.

    Raises:
        DataError: to follow the folder's name: it holds no series, or several.
    """
    ids = series_ids(folder)
    if len(ids) != 1:
        found = f"{len(ids)} DICOM series; give each a folder of its own" if ids else "no DICOM series"
        raise DataError(f"holds {found}")
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(os.fspath(folder), ids[0]))


def read_series(files: Sequence[str]) -> nib.Nifti1Image:
    """Reads the slices as one volume, with rescale slope and intercept applied.

    Raises:
        DataError: to follow the folder's name: slices are missing, doubled, uneven or askew (gantry tilt), differ in size
            or direction, or the files hold no images.
    """
    slices = [_header(name) for name in files]
    if len(slices) > 1:
        _require_straight(slices)
    try:
        image = sitk.ReadImage(list(files)) if len(files) > 1 else sitk.ReadImage(files[0])
    except RuntimeError as error:
        raise DataError(f"cannot be read: {str(error).strip().splitlines()[-1].strip()}") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise DataError(
            f"holds colours ({image.GetNumberOfComponentsPerPixel()} values a voxel), where a volume has one number"
        )
    affine = sitk_affine(image)
    if len(affine) != 4:
        raise DataError(f"has {len(affine) - 1} axes, {image.GetSize()}, where a volume has 3")
    voxels = sitk.GetArrayViewFromImage(image).T.copy(order="F")
    return nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)


def modality_of(folder: PathLike) -> str:
    """What the first file of a series says of its modality, such as ``CT``; nothing where it says none."""
    reader = _reader(series_files(folder)[0])
    return reader.GetMetaData(MODALITY).strip() if reader.HasMetaDataKey(MODALITY) else ""


def _reader(name: str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(name)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"cannot be read: {str(error).strip().splitlines()[-1].strip()}") from error
    return reader


def _header(name: str) -> _Slice:
    reader = _reader(name)
    modality = reader.GetMetaData(MODALITY).strip() if reader.HasMetaDataKey(MODALITY) else ""
    if modality in NO_VOLUMES:
        raise DataError(
            f"is no series of images: {Path(name).name} is a DICOM object of modality {modality}. Convert a segmentation to "
            "NIfTI first, with dcmqi for instance"
        )
    axes = np.array(reader.GetDirection()).reshape(reader.GetDimension(), -1)[:3, :3]
    spacing = tuple(round(float(value), 4) for value in reader.GetSpacing()[:2])
    return _Slice(Path(name).name, np.array(reader.GetOrigin()[:3]), axes, spacing, tuple(reader.GetSize()[:2]))


def _require_straight(slices: Sequence[_Slice]) -> None:
    """Slices of one size and direction, each straight above the one below, at equal distances."""
    first = slices[0]
    for other in slices[1:]:
        if other.size != first.size or other.spacing != first.spacing:
            raise DataError(
                f"mixes slices: {first.name} has {first.size} pixels of {first.spacing} mm, {other.name} {other.size} of "
                f"{other.spacing}. Give each kind a folder of its own"
            )
        if np.abs(other.axes - first.axes).max() > 1e-3:
            raise DataError(
                f"mixes directions: {first.name} and {other.name} are turned against each other. Give each direction a folder "
                "of its own"
            )
    places = np.array([item.origin for item in slices])
    steps = np.diff(places, axis=0)
    along = steps @ first.axes[:, 2]
    askew = np.linalg.norm(steps - along[:, None] * first.axes[:, 2], axis=1)
    if not np.abs(along).min() > 1e-3:
        place = int(np.abs(along).argmin())
        raise DataError(
            f"has two slices in one place: {slices[place].name} and {slices[place + 1].name}. Remove copies, and give each "
            "phase or echo a folder of its own"
        )
    if askew.max() > max(0.01 * np.abs(along).max(), 0.01):
        angle = np.degrees(np.arctan2(askew.max(), np.abs(along).max()))
        raise DataError(
            f"lies askew by {angle:.1f} degrees (gantry tilt): each slice is shifted by {askew.max():.3g} mm against the one "
            f"before, and a straight grid would put them in wrong places. {STRAIGHTEN}"
        )
    low, high = float(np.abs(along).min()), float(np.abs(along).max())
    if high - low > max(0.05 * high, 0.02):
        raise DataError(
            f"lacks slices or has uneven ones: they lie {low:.3g} to {high:.3g} mm apart. Complete the series, or "
            "resample it with a tool that knows the distances"
        )
