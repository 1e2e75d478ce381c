"""Volumes of every format as nibabel images: NIfTI, MGH, NRRD, MetaImage, and DICOM series.

Nothing else in the package opens a volume, so training, inference, checks and conversion see the same voxels in the same place.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

from monai_petl.data.dicom import read_series, series_files
from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.folders import VOLUME_ENDINGS, ending_of
from monai_petl.data.geometry import check_affine, require_one_reading, sitk_affine

__all__ = ["BY_ITK", "BY_NIBABEL", "last_line", "open_volume"]

BY_NIBABEL = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr", ".img")
BY_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
BROKEN = (
    *(OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, zlib.error),
    *(nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError),
)


def open_volume(path: PathLike) -> nib.spatialimages.SpatialImage:
    """Opens a volume; of NIfTI files the voxels are read when they are asked for.

    Args:
        path: a file with one of the :data:`VOLUME_ENDINGS` in upper or lower case, or a folder that holds one DICOM series.

    Returns:
        An image of three axes (H, W, D) with one number a voxel; its affine leads to mm in RAS. A picture of two axes is a
        volume of one slice, and trailing axes of one entry are dropped.

    Raises:
        DataError: to follow the file's name: "is missing", "cannot be read: ...", or why it is no such volume.
    """
    path = Path(path)
    if path.is_dir():
        image = read_series(series_files(path))
    elif not path.is_file():
        raise DataError("is missing")
    elif path.stat().st_size == 0:
        raise DataError("is an empty file. Copy it again from its source")
    elif ending_of(path) in BY_NIBABEL:
        image = _by_nibabel(path)
    elif ending_of(path) in BY_ITK:
        image = _by_itk(path)
    else:
        raise DataError(
            f"has none of the endings of volumes, {', '.join(VOLUME_ENDINGS)}, and is no folder of a DICOM series"
        )
    image = _three_axes(image)
    check_affine(np.asarray(image.affine, dtype=np.float64))
    return image


def last_line(error: Exception) -> str:
    """The line of a library's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _by_nibabel(path: Path) -> nib.spatialimages.SpatialImage:
    try:
        image = _load(path)
        dtype = image.get_data_dtype()
    except BROKEN as error:
        raise DataError(f"cannot be read: {last_line(error)}") from error
    if dtype.names is not None or dtype.kind not in "iufb":
        kind = "colours" if dtype.names is not None else "complex numbers"
        raise DataError(f"holds {kind} ({dtype}), where a volume has one real number a voxel. Save one channel alone")
    if isinstance(image, nib.Nifti1Pair) and np.isfinite(image.affine).all():
        require_one_reading(image, os.fspath(path))
    return image if isinstance(image, nib.Nifti1Pair) else nib.Nifti1Image(image.dataobj, image.affine, dtype=dtype)


def _load(path: Path) -> nib.spatialimages.SpatialImage:
    """nibabel's ``load``, which does not know endings such as ``.Nii``."""
    ending = ending_of(path)
    if path.name.endswith(ending) or ending in (".img", ".hdr"):
        return nib.load(path)
    holder = {"image": nib.fileholders.FileHolder(os.fspath(path))}
    return (nib.MGHImage if ending.startswith(".mg") else nib.Nifti1Image).from_file_map(holder)


def _by_itk(path: Path) -> nib.Nifti1Image:
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    try:
        reader.ReadImageInformation()
        count, kind = reader.GetNumberOfComponents(), sitk.GetPixelIDValueAsString(reader.GetPixelID())
        if count != 1 or "complex" in kind:
            raise DataError(
                f"holds {count} values a voxel ({kind}), where a volume has one real number. Save one channel alone"
            )
        image = reader.Execute()
    except DataError:
        raise
    except BROKEN as error:
        raise DataError(f"cannot be read: {last_line(error)}") from error
    voxels = sitk.GetArrayViewFromImage(image).T.copy(order="F")
    return nib.Nifti1Image(voxels, _four_by_four(sitk_affine(image)), dtype=voxels.dtype)


def _four_by_four(affine: np.ndarray) -> np.ndarray:
    """The affine of the first three axes, whatever the number of axes."""
    n = min(len(affine) - 1, 3)
    result = np.eye(4)
    result[:n, :n], result[:n, 3] = affine[:n, :n], affine[:n, -1]
    return result


def _three_axes(image: nib.spatialimages.SpatialImage) -> nib.spatialimages.SpatialImage:
    shape = tuple(int(n) for n in image.shape)
    if 0 in shape:
        raise DataError(f"has no voxels: its shape is {shape}")
    if len(shape) == 3:
        return image
    wanted = (*shape, 1) if len(shape) == 2 else shape[:3]
    if len(shape) < 2 or np.prod(wanted) != np.prod(shape):
        raise DataError(
            f"has {len(shape)} axes, {shape}, where a volume has 3: it holds several channels or times. Save each as a file "
            "of its own"
        )
    try:
        voxels = np.asanyarray(image.dataobj).reshape(wanted)
    except BROKEN as error:
        raise DataError(f"cannot be read: {last_line(error)}") from error
    return nib.Nifti1Image(voxels, image.affine, dtype=voxels.dtype)
