"""Refuse images that no network can learn from, with the name of the file."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import MapTransform

__all__ = ["RequireContentd"]


class RequireContentd(MapTransform):
    """Raise ``ValueError`` naming the file when an image holds NaN or infinity, or one value only. Leaves the data alone.

    Place it right after loading, before any normalisation turns the fault into something plausible.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            image = data[key]
            name = getattr(image, "meta", {}).get("filename_or_obj", key)
            low, high = torch.aminmax(image)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ValueError(f"{name} holds NaN or infinite values; repair the image or leave it out")
            if low == high:
                raise ValueError(f"{name} is constant (every voxel is {float(low):g}); leave it out")
        return dict(data)
