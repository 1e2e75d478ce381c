"""Volumes as files: their grid, their voxels, and whether an image or a label can hold such values."""

from __future__ import annotations

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.volume_files import BROKEN, open_volume, unreadable

__all__ = [
    "MOST_FRACTION",
    "Grid",
    "count_values",
    "grid_difference",
    "intensity_range",
    "read_array",
    "read_grid",
    "whole_numbers",
]

Grid = tuple[tuple[int, ...], NDArray[np.float64]]  # shape in voxels, affine from voxels to mm in RAS
MOST_FRACTION = 1e-3  # by which a label value may lie beside a whole number, as after scaling or resampling


def read_grid(path: PathLike) -> Grid:
    """Reads shape (H, W, D) and affine (voxel -> mm, RAS) of a volume.

    Raises:
        DataError: as :func:`monai_petl.data.volume_files.open_volume`, to follow the file's name.
    """
    return grid_of(open_volume(path))


def grid_of(image: nib.spatialimages.SpatialImage) -> Grid:
    """Shape and affine of an open volume."""
    return tuple(int(n) for n in image.shape), np.asarray(image.affine, dtype=np.float64)


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


def read_array(path: PathLike) -> NDArray[np.generic]:
    """Reads the voxels as (H, W, D).

    Raises:
        DataError: as :func:`read_grid`.
    """
    return array_of(open_volume(path))


def array_of(image: nib.spatialimages.SpatialImage) -> NDArray[np.generic]:
    """The voxels (H, W, D) of an open volume.

    Raises:
        DataError: "cannot be read: ...", to follow the file's name.
    """
    try:
        return np.asanyarray(image.dataobj)
    except BROKEN as error:
        raise unreadable(error) from error


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


def whole_numbers(voxels: NDArray[np.generic]) -> NDArray[np.generic]:
    """The values of a label as the whole numbers that are meant, from 0 to 65535.

    A value within 0.001 of a whole number is that number: scaling and resampling leave 1.9999998 in place of 2.

    Raises:
        DataError: to follow the file's name: a value lies further away, is NaN, negative, or too large.
    """
    if not voxels.size:
        raise DataError("has no voxels")
    if np.issubdtype(voxels.dtype, np.inexact):
        rounded = np.rint(voxels)
        with np.errstate(invalid="ignore"):
            apart = ~(np.abs(voxels - rounded) <= MOST_FRACTION)  # NaN is among them
        if apart.any():
            raise DataError(
                f"holds {int(np.count_nonzero(apart))} label values that are not whole numbers, such as "
                f"{float(voxels[apart][0]):.7g}. Resample labels with nearest neighbours"
            )
        voxels = rounded
    low, high = float(voxels.min()), float(voxels.max())
    if low < 0 or high > 65535:
        raise DataError(f"holds label values from {low:g} to {high:g}, where 0 to 65535 is possible")
    return voxels


def count_values(voxels: NDArray[np.generic]) -> dict[int, int]:
    """Voxels of each value of a label, see :func:`whole_numbers`."""
    voxels = whole_numbers(voxels)
    size = int(voxels.max()) + 1
    planes = (np.bincount(plane.ravel().astype(np.int64), minlength=size) for plane in np.moveaxis(voxels, -1, 0))
    counts = sum(planes, np.zeros(size, dtype=np.int64))
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
