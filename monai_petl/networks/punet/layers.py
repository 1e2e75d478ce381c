"""Convolution, normalisation and upsampling that are fast on axial slices held as volumes of depth one.

A slice (B, C, H, W, 1) in channels-last memory is, without a copy, an image for the 2D kernels, which run two to five
times faster on a CPU than 3D kernels of depth one. Results equal those of the 3D operations to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BatchNorm3d", "Conv3d", "upsample_like"]


class Conv3d(nn.Conv3d):
    """3D convolution with "same" padding for odd kernels; slices of depth one run as 2D images.

    Attributes:
        slices_as_images: set to ``False`` for the rounding of 3D kernels.
    """

    slices_as_images = True

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int], bias: bool = True
    ) -> None:
        (h, w, d), (stride_h, stride_w, stride_d) = kernel_size, stride
        padding, strides = (h // 2, w // 2, d // 2), (stride_h, stride_w, stride_d)
        super().__init__(in_channels, out_channels, (h, w, d), strides, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 1 or self.kernel_size[2] != 1 or not self.slices_as_images:
            return super().forward(x)
        x = x.squeeze(-1).contiguous(memory_format=torch.channels_last)
        pad_h, pad_w = self.kernel_size[0] // 2, self.kernel_size[1] // 2
        return as_volume(F.conv2d(x, self.weight.squeeze(-1), self.bias, self.stride[:2], (pad_h, pad_w)))


class BatchNorm3d(nn.BatchNorm3d):
    """Batch normalisation that, with stored statistics and frozen parameters, keeps no activation for backward."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.running_mean is None or self.running_var is None:
            return super().forward(x)
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        shape = (1, -1, 1, 1, 1)
        return torch.addcmul(shift.view(shape).to(x.dtype), x, scale.view(shape).to(x.dtype))


def upsample_like(x: Tensor, scale: Sequence[int], skip: Tensor) -> Tensor:
    """Enlarge (B, C, H, W, D) by a whole factor an axis (trilinear, ``align_corners=False``) and crop the end to ``skip``."""
    x = upsample(x, scale)
    return x[:, :, : skip.shape[2], : skip.shape[3], : skip.shape[4]]


def upsample(x: Tensor, scale: Sequence[int]) -> Tensor:
    """Trilinear enlargement by a whole factor an axis; slices of depth one run as 2D images."""
    factors = [float(s) for s in scale]
    if x.shape[-1] == 1 and scale[2] == 1:
        return as_volume(F.interpolate(x.squeeze(-1), scale_factor=factors[:2], mode="bilinear", align_corners=False))
    return F.interpolate(x, scale_factor=factors, mode="trilinear", align_corners=False)


def as_volume(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W, 1). Unlike ``unsqueeze(-1)``, channels-last memory is recognised as such afterwards,
    so that what follows (concatenation above all) keeps to it."""
    return image.movedim(1, -1).unsqueeze(3).movedim(-1, 1)
