"""Whole volumes by a network that sees a window of slices and predicts the one in its centre.

This is how "Adapting Pre-trained Vision Transformers from 2D to 3D through Weight Inflation Improves Medical Image
Segmentation", arXiv:2302.04303 (2022), predicts: every slice in turn, with the first and last slice repeated beyond the ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.utils import convert_to_dst_type
from torch import Tensor

__all__ = ["CenterSliceInferer"]


class CenterSliceInferer(SlidingWindowInferer):
    """MONAI's sliding window within each slice; along the last axis a window of S slices is centred on each slice in turn.

    Args:
        roi_size: (h, w, S), what the network takes; its output is (B, K, h, w, 1), of slice S // 2 of the window.
        sw_batch_size: windows at a time, and slices that are prepared at a time.
        args, kwargs: as those of ``SlidingWindowInferer``, and for the plane.

    Raises:
        ValueError: ``roi_size`` has not three positive numbers.

    Example::

        logits = CenterSliceInferer((224, 224, 5), sw_batch_size=8, overlap=0.5)(volume, network)  # (B, K, H, W, D)
    """

    def __init__(self, roi_size: Sequence[int], sw_batch_size: int = 1, *args: Any, **kwargs: Any) -> None:
        if len(roi_size) != 3 or min(roi_size) < 1:
            raise ValueError(f"roi_size must be three positive numbers of voxels (h, w, slices), got {tuple(roi_size)}")
        super().__init__(roi_size[:2], sw_batch_size, *args, **kwargs)
        self.slices = roi_size[2]

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """
        Args:
            inputs: a volume (B, C, H, W, D) of any depth.
            network: (b, C, h, w, S) -> (b, K, h, w, 1).
            args, kwargs: handed to the network.

        Returns:
            (B, K, H, W, D).
        """

        def predict(patches: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            windows = rearrange(patches, "b (c s) h w -> b c h w s", s=self.slices)
            return network(windows, *args, **kwargs).squeeze(-1)

        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        if 0 in volume.shape:
            raise ValueError(f"the volume is empty, its shape is {tuple(volume.shape)}")
        offsets = torch.arange(self.slices) - self.slices // 2
        whole = volume[:, :0]
        for centers in torch.arange(volume.shape[-1]).split(self.sw_batch_size):
            seen = (centers[:, None] + offsets).clamp(0, volume.shape[-1] - 1)  # (d, S): repeats the slices at the ends
            windows = rearrange(volume[..., seen.to(volume.device)], "b c h w d s -> (b d) (c s) h w")
            logits = super().__call__(windows, predict, *args, **kwargs)
            logits = rearrange(logits, "(b d) k h w -> b k h w d", d=len(centers))
            if not whole.shape[1]:
                whole = logits.new_empty(*logits.shape[:-1], volume.shape[-1])
            whole[..., centers] = logits
        return convert_to_dst_type(whole, inputs, device=whole.device)[0] if isinstance(inputs, MetaTensor) else whole
