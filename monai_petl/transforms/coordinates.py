"""Voxel coordinates as an image, so that crops and affine transforms carry along where each voxel came from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

__all__ = ["AddCoordinatesd", "voxel_coordinates"]


class AddCoordinatesd(Transform):
    """Adds `coords_key`: for each voxel its index along the three axes minus the centre of the volume, in voxels.

    Best placed after the random crop, where it costs little: the crops at the end of the image's history (its
    `applied_operations`) are undone in the arithmetic, so all crops of one volume share one frame. Without such crops,
    or without a history, the image itself is the volume. The result (3, H, W, D) is a plain float32 tensor.

    Args:
        image_key: image (C, H, W, D) whose voxels are numbered.
        coords_key: where the coordinates go.

    Raises:
        ValueError: the image has not three spatial axes, or has lazy operations pending.

    Example::

        Compose([RandSpatialCropSamplesd(("image", "label"), (256, 256, 1), num_samples=2), AddCoordinatesd()])
    """

    def __init__(self, image_key: Hashable = "image", coords_key: Hashable = "coords") -> None:
        self.image_key = image_key
        self.coords_key = coords_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data[self.image_key]
        if image.ndim != 4:
            raise ValueError(
                f"coordinates need an image (C, H, W, D) with three spatial axes, got {tuple(image.shape)}"
            )
        if isinstance(image, MetaTensor) and image.pending_operations:
            raise ValueError("the image has lazy operations pending; put AddCoordinatesd outside the lazy part")
        start, volume = _place_in_volume(image)
        return {**data, self.coords_key: voxel_coordinates(image.shape[1:], start, volume)}


def voxel_coordinates(size: tuple[int, ...], start: list[int], volume: list[int]) -> Tensor:
    """Coordinates (3, *size) of a box at index `start` of a volume; its centre `(volume - 1) / 2` is the origin."""
    axes = [
        torch.arange(extent, dtype=torch.float32) + (first - (whole - 1) / 2)
        for extent, first, whole in zip(size, start, volume, strict=True)
    ]
    coordinates = torch.empty((3, *size))
    for axis, values in enumerate(axes):
        coordinates[axis] = values.view([-1 if other == axis else 1 for other in range(3)])
    return coordinates


def _place_in_volume(image: Tensor) -> tuple[list[int], list[int]]:
    """First index of the image in the volume it was cropped from, and the size of that volume."""
    start, volume = [0, 0, 0], list(image.shape[1:])
    for operation in reversed(getattr(image, "applied_operations", [])):
        info = operation
        while isinstance(info.get("extra_info"), Mapping):  # MONAI nests the crop inside the transform that drew it
            info = info["extra_info"]
        if "cropped" not in info:
            break
        start = [first + removed for first, removed in zip(start, info["cropped"][::2], strict=True)]
        volume = list(operation["orig_size"])
    return start, volume
