"""Whether the voxels of a file are all there and as they were written, without a second look at any of them."""

from __future__ import annotations

import gzip
import math
import os
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from numpy.typing import DTypeLike, NDArray

from monai_petl.data.errors import DataError

__all__ = ["CheckedVoxels", "packed", "require_whole"]

MOST_PACKED = 1032  # bytes that one byte of gzip can stand for
PIECE = 1 << 20


def packed(name: str | os.PathLike[str]) -> bool:
    """Whether a file is packed by gzip, by its name."""
    return os.fspath(name).lower().endswith((".gz", ".mgz"))


def require_whole(image: nib.spatialimages.SpatialImage) -> None:
    """Refuse a file that cannot hold the voxels that its header promises; only its size is looked at.

    Raises:
        DataError: to follow the file's name.
    """
    proxy, name = image.dataobj, os.fspath(image.file_map["image"].filename)
    if not os.path.isfile(name):
        raise DataError(
            f"lacks its voxels: they are in {os.path.basename(name)}, which is not there. Copy both files into one folder"
        )
    size = os.path.getsize(name)
    promised = proxy.offset + math.prod(int(n) for n in image.shape) * proxy.dtype.itemsize
    if promised > size * (MOST_PACKED if packed(name) else 1):
        raise DataError(
            f"is cut off, or its header is wrong: it promises {promised:,} bytes for a shape of {tuple(image.shape)}, and the "
            f"file has {size:,}. Copy or export it again from its source"
        )


class CheckedVoxels:
    """The voxels of a file that is packed by gzip, read when they are asked for; then its checksum is compared.

    nibabel stops after the last voxel, and so before the checksum, which tells a damaged file.
    """

    is_proxy = True

    def __init__(self, image: nib.spatialimages.SpatialImage) -> None:
        proxy = image.dataobj
        self.name = os.fspath(image.file_map["image"].filename)
        self.shape, self.ndim = tuple(proxy.shape), proxy.ndim
        self.dtype = proxy.dtype
        self._spec = (proxy.shape, proxy.dtype, proxy.offset, proxy.slope, proxy.inter)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        with gzip.open(self.name) as file:
            voxels = np.asanyarray(ArrayProxy(file, self._spec))
            while file.read(PIECE):  # to the end, where gzip compares the checksum
                pass
        return voxels if dtype is None else voxels.astype(dtype, copy=False)

    def __getitem__(self, slices: Any) -> NDArray[Any]:
        return ArrayProxy(self.name, self._spec)[slices]
