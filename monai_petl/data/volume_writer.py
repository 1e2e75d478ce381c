"""The writer of segmentations for MONAI's ``SaveImage``: as many axes as the image has, and never half a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from monai.config import NdarrayOrTensor
from monai.data import NibabelWriter
from monai.data.folder_layout import default_name_formatter
from monai.utils import convert_data_type

from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.folders import ending_of, stem
from monai_petl.data.volume_files import BY_ITK, BY_NIBABEL
from monai_petl.files.atomic import written_whole

__all__ = ["VolumeWriter", "output_name", "write_volume"]


class VolumeWriter(NibabelWriter):
    """Writes .nii, .nii.gz, .nrrd and .mha; the file appears whole or not at all.

    MONAI's own writer drops the last axis of a volume of one slice; this one keeps three.

    Example, in a bundle's config::

        {"_target_": "SaveImaged", "keys": "pred", "writer": "monai_petl.data.VolumeWriter", "output_ext": ".nii.gz"}

    Raises:
        DataError: a value does not fit the type of the output; or the ending is unknown.
        OSError: the file cannot be written; a former one is still there.
    """

    def set_data_array(self, data_array: NdarrayOrTensor, channel_dim: int | None = 0, **kwargs: Any) -> None:
        """Takes the voxels, (C, H, W, D) with one channel or (H, W, D)."""
        super().set_data_array(data_array, channel_dim, **{**kwargs, "squeeze_end_dims": False})
        array: np.ndarray = convert_data_type(self.data_obj, np.ndarray)[0]  # type: ignore[has-type]
        if array.ndim == 4 and array.shape[-1] == 1:
            array = array[..., 0]
        kind = np.dtype(self.output_dtype) if self.output_dtype is not None else array.dtype
        if np.issubdtype(kind, np.integer) and array.size:
            low, high = float(array.min()), float(array.max())
            if low < np.iinfo(kind).min or high > np.iinfo(kind).max:
                raise DataError(
                    f"the values {low:g} to {high:g} do not fit {kind}; give a larger output_dtype to SaveImaged"
                )
        self.data_obj = array

    def write(self, filename: PathLike, verbose: bool = False, **kwargs: Any) -> None:
        """Writes the file."""
        affine = np.asarray(convert_data_type(self.affine, np.ndarray)[0], dtype=np.float64)
        write_volume(filename, np.asarray(self.data_obj).astype(self.output_dtype, copy=False), affine)


def output_name(metadata: Mapping[str, Any], saver: object = None) -> dict[str, Any]:
    """How ``SaveImage`` names its output: by the input's name without its ending, whatever case that has.

    MONAI cuts a name at its last dot, so that the series in folders 1.2.3 and 1.2.4 would overwrite each other, and keeps half
    of ``.NII.GZ``. Given as ``output_name_formatter``.
    """
    found = default_name_formatter(dict(metadata), saver)
    return {**found, "subject": f"{stem(os.path.normpath(str(found['subject'])))}.nii.gz"}


def write_volume(path: PathLike, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Writes voxels (H, W, D) with their affine (voxel -> mm, RAS), as the ending says.

    NIfTI files get the affine as sform, and as qform too where its axes are at right angles, so that all programs read the
    same place.

    Raises:
        DataError: the ending is none of .nii, .nii.gz, .nrrd, .mha; or these formats cannot hold the affine.
        OSError: the file cannot be written; a former one is still there.
    """
    ending = ending_of(path)
    if ending not in (".nii", ".nii.gz", ".nrrd", ".mha"):
        raise DataError(f"{path} cannot be written: its ending must be one of .nii.gz, .nii, .nrrd, .mha")
    with written_whole(path, "the volume") as part:
        if ending in BY_NIBABEL:
            nib.save(_nifti(voxels, affine), part)
        elif ending in BY_ITK:
            try:
                sitk.WriteImage(_itk(voxels, affine), str(part), useCompression=True)
            except RuntimeError as error:
                raise OSError(str(error).strip().splitlines()[-1].strip()) from error


def _nifti(voxels: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    image.set_sform(affine, 1)
    if _at_right_angles(affine):
        image.set_qform(affine, 1)
    return image


def _itk(voxels: np.ndarray, affine: np.ndarray) -> sitk.Image:
    if not _at_right_angles(affine):
        raise DataError("axes that are not at right angles cannot be kept in NRRD or MetaImage; write .nii.gz")
    flipped = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(flipped[:3, :3], axis=0)
    image = sitk.GetImageFromArray(voxels.T)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(flipped[:3, 3].tolist())
    image.SetDirection((flipped[:3, :3] / spacing).ravel().tolist())
    return image


def _at_right_angles(affine: np.ndarray) -> bool:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() < 1e-5)
