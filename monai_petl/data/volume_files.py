"""Volumes of every format as nibabel images: NIfTI, MGH, NRRD, MetaImage, and DICOM series.

Nothing else in the package opens a volume, so training, inference, checks and conversion see the same voxels in the same place.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

from monai_petl.data.dicom import read_series, series_files
from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.folders import VOLUME_ENDINGS, ending_of
from monai_petl.data.geometry import check_affine, require_one_reading, sitk_affine
from monai_petl.data.nifti_header import raw_header, require_sound_mgh, require_sound_nifti
from monai_petl.data.text_header import require_sound_text_header
from monai_petl.data.whole_voxels import CheckedVoxels, packed, require_whole

__all__ = ["BROKEN", "BY_ITK", "BY_NIBABEL", "open_volume", "unreadable"]

BY_NIBABEL = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr", ".img")
BY_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
BROKEN = (
    *(OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, MemoryError, OverflowError, zlib.error),
    *(nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError),
    *(nib.freesurfer.mghformat.MGHError, struct.error, ArithmeticError),
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


def unreadable(error: BaseException) -> DataError:
    """The refusal of a file that a library cannot read, with what the library says and what to do."""
    return DataError(f"cannot be read: {_said(error)}. Copy or export it again from its source")


def _said(error: BaseException) -> str:
    """What a library's message says is wrong, on one line: without its own files, lines and addresses."""
    text = re.sub(r"\(0x[0-9a-f]+\)|sitk::ERROR: ", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    if last.startswith("Reason:"):  # MetaIO's, which says nothing of the voxels that it misses
        last = "its voxels are cut off or missing"
    itk = re.search(r"ITK ERROR: (?:[\w ]+: )?(.*)", text, re.DOTALL)
    whole = itk and not last.startswith(("[nrrd]", "its voxels"))  # the numbers of a matrix stand on lines of their own
    said = " ".join(itk[1].split()) if itk and whole else last
    return said[:200].rstrip(".")


def _by_nibabel(path: Path) -> nib.spatialimages.SpatialImage:
    try:
        image = _load(path)
        if not isinstance(image, nib.Nifti1Pair | nib.MGHImage):
            raise DataError(
                f"is no NIfTI volume but of the kind {type(image).__name__}, which does not say which side is left. Convert it "
                "to NIfTI with the program that wrote it"
            )
        dtype = image.get_data_dtype()
        header = raw_header(image) if isinstance(image, nib.Nifti1Pair) else None
    except DataError:
        raise
    except BROKEN as error:
        raise unreadable(error) from error
    if dtype.names is not None or dtype.kind not in "iufb":
        kind = "colours" if dtype.names is not None else "complex numbers"
        raise DataError(f"holds {kind} ({dtype}), where a volume has one real number a voxel. Save one channel alone")
    check_affine(np.asarray(image.affine, dtype=np.float64))
    require_whole(image)
    if header is None:
        require_sound_mgh(path)
    else:
        require_one_reading(image, header)
        require_sound_nifti(image, header)
    voxels = CheckedVoxels(image) if packed(image.file_map["image"].filename) else image.dataobj
    if header is None:
        return nib.Nifti1Image(voxels, image.affine, dtype=dtype)
    return type(image)(voxels, image.affine, image.header) if isinstance(voxels, CheckedVoxels) else image


def _load(path: Path) -> nib.spatialimages.SpatialImage:
    """nibabel's ``load``, which does not know endings such as ``.Nii``."""
    ending = ending_of(path)
    if path.name.endswith(ending) or ending in (".img", ".hdr"):
        return nib.load(path)
    holder = {"image": nib.fileholders.FileHolder(os.fspath(path))}
    if ending.startswith(".mg"):
        return nib.MGHImage.from_file_map(holder)
    try:
        return nib.Nifti1Image.from_file_map(holder)
    except nib.spatialimages.HeaderDataError:
        return nib.Nifti2Image.from_file_map(holder)


def _by_itk(path: Path) -> nib.Nifti1Image:
    ending = ending_of(path)
    require_sound_text_header(path, ending)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if ending in (".nrrd", ".nhdr") else "MetaImageIO")  # it goes by lower-case endings
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
        raise unreadable(error) from error
    n = image.GetDimension()
    lengths = np.linalg.norm(np.array(image.GetDirection()).reshape(n, n), axis=0)
    if np.abs(lengths - 1).max() > 1e-3:
        raise DataError(
            f"has directions of length {' and '.join(f'{length:.4g}' for length in lengths)}, where 1 is expected, so the "
            "voxel size is given twice. Write it again with SimpleITK or 3D Slicer"
        )
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
    if not shape or min(shape) < 1:
        raise DataError(f"has no voxels: its shape is {shape}. Export it again from its source")
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
        raise unreadable(error) from error
    return nib.Nifti1Image(voxels, image.affine, dtype=voxels.dtype)
