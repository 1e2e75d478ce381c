"""Volumes as files: their grid, their voxels, and whether an image or a label can hold such values."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from monai_petl.data.datalist import DataError, PathLike

__all__ = [
    "Grid",
    "count_values",
    "grid_difference",
    "intensity_range",
    "last_line",
    "read_array",
    "read_grid",
    "sitk_grid",
]

Grid = tuple[tuple[int, ...], NDArray[np.float64]]  # shape in voxels, affine from voxels to mm in RAS


def read_grid(path: PathLike) -> Grid:
    """Reads shape and affine (voxel -> mm, RAS) from the header of a NIfTI, NRRD or MetaImage file.

    Raises:
        DataError: "is missing" or "cannot be read: ...", to follow the file's name.
    """
    if not Path(path).is_file():
        raise DataError("is missing")
    try:
        if str(path).endswith((".nii", ".nii.gz")):
            header = nib.load(path)
            return tuple(int(n) for n in header.shape), np.asarray(header.affine, dtype=np.float64)
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
    except Exception as error:
        raise DataError(f"cannot be read: {last_line(error)}") from error
    return sitk_grid(reader)


def sitk_grid(image: sitk.Image | sitk.ImageFileReader) -> Grid:
    """Shape and affine (voxel -> mm, RAS) of a SimpleITK image, whose own axes run to the left and to the back."""
    n = image.GetDimension()
    affine = np.eye(n + 1)
    affine[:n, :n] = np.array(image.GetDirection()).reshape(n, n) * np.array(image.GetSpacing())
    affine[:n, n] = image.GetOrigin()
    affine[:2] *= -1
    return tuple(image.GetSize()), affine


def grid_difference(
    first: Grid,
    second: Grid,
    tolerance: float = 0.05,
) -> str:
    """Says how two grids differ, in words; empty when their corners agree within ``tolerance`` voxels."""
    if first[0] != second[0]:
        return f"shape {second[0]} instead of {first[0]}"
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in first[0]], [1], indexing="ij")).reshape(4, -1)
    distance = float(np.linalg.norm(((second[1] - first[1]) @ corners)[:3], axis=0).max())
    if distance <= tolerance * float(nib.affines.voxel_sizes(first[1]).min()):
        return ""
    return f"corners lie up to {distance:.3g} mm apart (origin, spacing or direction differ)"


def read_array(path: str) -> NDArray[np.generic]:
    """Reads the voxels as (H, W, D)."""
    try:
        if path.endswith((".nii", ".nii.gz")):
            return np.asanyarray(nib.load(path).dataobj)
        return sitk.GetArrayFromImage(sitk.ReadImage(path)).T
    except Exception as error:
        raise DataError(f"cannot be read: {last_line(error)}") from error


def intensity_range(voxels: NDArray[np.generic]) -> tuple[float, float]:
    """Smallest and largest intensity of an image, which must be finite and not all equal."""
    if np.issubdtype(voxels.dtype, np.inexact):
        wrong = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
        if wrong:
            raise DataError(f"holds {wrong} voxels that are NaN or infinite")
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        raise DataError(f"is constant: every voxel is {low:g}")
    return low, high


def count_values(voxels: NDArray[np.generic]) -> dict[int, int]:
    """Voxels of each value of a label, which must hold whole numbers from 0 to 65535."""
    low, high = float(voxels.min()), float(voxels.max())
    if np.issubdtype(voxels.dtype, np.inexact):
        fractions = voxels[voxels != np.rint(voxels)]  # NaN is among them
        if fractions.size:
            raise DataError(f"holds {fractions.size} label values that are not whole numbers, such as {fractions[0]:g}")
    if low < 0 or high > 65535:
        raise DataError(f"holds label values from {low:g} to {high:g}, where 0 to 65535 is possible")
    planes = (
        np.bincount(plane.ravel().astype(np.int64), minlength=int(high) + 1) for plane in np.moveaxis(voxels, -1, 0)
    )
    counts = sum(planes, np.zeros(int(high) + 1, dtype=np.int64))
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def last_line(error: Exception) -> str:
    """The line of a library's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
