"""DICOM series as volumes: the slices of a folder in order, if they make a straight grid.

Places come from the headers of the slices: position (0020,0032), orientation (0020,0037) and pixel spacing (0028,0030). A
header without them is refused, since ITK would assume axial slices of 1 mm. Reference: DICOM PS3.3, C.7.6.2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

from monai_petl.data.dicom_slices import MODALITY, Slice, read_header, read_slice, require_straight, thickness
from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.said import say_once, summarised

__all__ = ["modality_of", "read_series", "series_files", "series_ids"]

ENDINGS = (".dcm", ".dicom", ".ima")
MARK = b"DICM"  # at byte 128 of a DICOM file


def series_ids(folder: PathLike) -> tuple[str, ...]:
    """The DICOM series of a folder, without those below it."""
    told = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # it would warn of each folder without a series
    try:
        return tuple(sitk.ImageSeriesReader.GetGDCMSeriesIDs(os.fspath(folder)))
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(told)


def series_files(folder: PathLike) -> tuple[str, ...]:
    """The files of the one series in a folder, in the order of their places.

    Raises:
        DataError: to follow the folder's name: it holds no series, several, or DICOM files that cannot be read.
    """
    ids = series_ids(folder)
    if len(ids) != 1:
        found = f"{len(ids)} DICOM series; give each a folder of its own" if ids else "no DICOM series"
        raise DataError(f"holds {found}")
    files = tuple(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(os.fspath(folder), ids[0]))
    beside = set(os.listdir(folder)) - {os.path.basename(name) for name in files}
    damaged = sorted(name for name in beside if _looks_like_dicom(Path(folder, name)))
    if damaged:
        raise DataError(
            f"holds DICOM files that cannot be read as part of its series: {summarised(damaged)}. Copy the series again from "
            "its source, or move what does not belong to it elsewhere"
        )
    others = sorted(name for name in beside if not name.startswith("."))
    if others:
        say_once(f"{folder} holds a DICOM series; what lies beside it is not read: {summarised(others)}")
    return files


def read_series(files: Sequence[str]) -> nib.Nifti1Image:
    """Reads the slices as one volume, with rescale slope and intercept applied.

    Raises:
        DataError: to follow the folder's name: slices are missing, doubled, uneven or askew (gantry tilt), differ in size
            or direction, do not say where they lie, or the files hold no images.
    """
    slices = [read_slice(name) for name in files]
    step = require_straight(slices) if len(slices) > 1 else slices[0].axes[:, 2] * thickness(files[0])
    kinds = {item.kind for item in slices}
    # where slopes differ, ITK would cut the values of all slices to the type of the first
    kind = kinds.pop() if len(kinds) == 1 else sitk.sitkFloat64
    told = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # distances have been looked at
    try:
        image = sitk.ReadImage(list(files), kind) if len(files) > 1 else sitk.ReadImage(files[0], kind)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise DataError(f"cannot be read: {last}. Copy the series again from its source") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(told)
    if image.GetDimension() != 3:
        raise DataError(f"has {image.GetDimension()} axes, {image.GetSize()}, where a volume has 3")
    voxels = sitk.GetArrayViewFromImage(image).T.copy(order="F")
    return nib.Nifti1Image(voxels, _affine(slices[0], step), dtype=voxels.dtype)


def modality_of(folder: PathLike) -> str:
    """What the first file of a series says of its modality, such as ``CT``; nothing where it says none."""
    reader = read_header(series_files(folder)[0])
    return reader.GetMetaData(MODALITY).strip() if reader.HasMetaDataKey(MODALITY) else ""


def _affine(first: Slice, step: np.ndarray) -> np.ndarray:
    """Affine (voxel -> mm, RAS) from the first slice and the way to the next; DICOM's axes run to the left and to the back."""
    affine = np.eye(4)
    affine[:3, :2] = first.axes[:, :2] * first.spacing
    affine[:3, 2], affine[:3, 3] = step, first.origin
    affine[:2] *= -1
    return affine


def _looks_like_dicom(path: Path) -> bool:
    if not path.is_file() or path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return False
    with path.open("rb") as file:
        return path.suffix.lower() in ENDINGS or file.read(132)[128:] == MARK
