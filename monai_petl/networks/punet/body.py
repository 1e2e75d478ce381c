"""The frozen part of PUNet: a U-Net of convolutions and prompt-able window attention that yields a dense embedding.

M. Fischer, A. Bartler, B. Yang, "Prompt Tuning for Parameter-efficient Medical Image Segmentation", arXiv:2211.09233 (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_petl.networks.punet.attention import AttentionPrompt, WindowAttention
from monai_petl.networks.punet.layers import BatchNorm3d, Conv3d, upsample_like
from monai_petl.networks.punet.prompts import StackedPrompts

__all__ = ["BlockPrompts", "PUNetBody"]

BlockPrompts = Mapping[str, tuple[AttentionPrompt, AttentionPrompt]]
AttentionFactory = Callable[[int], WindowAttention]
POINT = (1, 1, 1)


class PUNetBody(nn.Module):
    """Image to dense embedding at half the in-plane resolution. Axes are (B, C, H, W, D) with D last, often 1.

    Args:
        in_channels: image channels.
        channels: width of each level; the first is the width of the embedding.
        design_depth: number of slices D that the depth kernels and strides are made for.
        attention: makes the attention block of a given width.
    """

    def __init__(
        self, in_channels: int, channels: Sequence[int], design_depth: int, attention: AttentionFactory
    ) -> None:
        super().__init__()
        levels = len(channels)
        depth_kernels = [3 if design_depth / 2**i >= 3 else 1 for i in range(levels)]
        depth_strides = [1] + [2 if design_depth / 2**i > 1 else 1 for i in range(1, levels)]
        self.blocks: dict[str, int] = {}  # name and width of every level that attends to tokens
        self.stem = Stem(in_channels, channels[0], 3 if design_depth >= 3 else 1)
        self.encoder = nn.ModuleDict()
        for i, width in enumerate(channels):
            stride = (1, 1, 1) if i == 0 else (2, 2, depth_strides[i])
            previous = channels[max(i - 1, 0)]
            self.encoder[f"enc{i}"] = EncoderBlock(previous, width, depth_kernels[i], stride, attention(width))
            self.blocks[f"enc{i}"] = width
        self.decoder = nn.ModuleDict()
        for j, i in enumerate(reversed(range(levels - 1))):
            below, width, scale = channels[i + 1], channels[i], (2, 2, depth_strides[i + 1])
            self.decoder[f"dec{j}"] = DecoderBlock(below, width, depth_kernels[i + 1], scale, attention(width))
            self.blocks[f"dec{j}"] = width

    def forward(self, image: Tensor, prompts: BlockPrompts | None = None, passes: int = 1) -> Tensor:
        """Dense embedding.

        Args:
            image: (B, in_channels, H, W, D).
            prompts: keys and values of tokens by level, one row for each of ``B * passes`` elements; ``None`` or a level
                without an entry attends to content only.
            passes: how often each image is segmented with different prompts. What does not depend on prompts is
                computed once.

        Returns:
            (B * passes, C0, ceil(H/2), ceil(W/2), D); element ``b * passes + p`` is pass p of image b.
        """
        prompts = prompts or {}
        x = self.stem(image)
        skips: list[Tensor] = []
        for name in self.encoder:
            block = cast(EncoderBlock, self.encoder[name])
            local, shortcut = block.local(x)
            if name == "enc0" and passes > 1:
                local, shortcut = (t.repeat_interleave(passes, 0) for t in (local, shortcut))
            x = block.attention(local, prompts.get(name)) + shortcut
            skips.append(x)
        skips.pop()
        for name, decoder_block in self.decoder.items():
            x = decoder_block(x, skips.pop(), prompts.get(name))
        return x

    def project(self, stacked: StackedPrompts) -> BlockPrompts:
        """Keys and values of the tokens in every sub-block; they depend on the weights, not on the image."""
        return {
            name: self.level(name).attention.project_tokens(tokens, stacked.token_bias[name])
            for name, tokens in stacked.tokens.items()
        }

    def level(self, name: str) -> EncoderBlock | DecoderBlock:
        """The level of this name, such as ``"enc0"`` or ``"dec3"``."""
        return cast("EncoderBlock | DecoderBlock", self.encoder[name] if name in self.encoder else self.decoder[name])


class Stem(nn.Module):
    """Residual block that halves the plane. MONAI's ``UnetResBlock`` has the same form; this one runs slices in 2D."""

    def __init__(self, in_channels: int, out_channels: int, depth_kernel: int) -> None:
        super().__init__()
        kernel, stride = (3, 3, depth_kernel), (2, 2, 1)
        self.conv1 = Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.norm1 = BatchNorm3d(out_channels)
        self.conv2 = Conv3d(out_channels, out_channels, kernel, POINT, bias=False)
        self.norm2 = BatchNorm3d(out_channels)
        self.shortcut = Conv3d(in_channels, out_channels, POINT, stride, bias=False)
        self.shortcut_norm = BatchNorm3d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = activate(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y)) + self.shortcut_norm(self.shortcut(x))
        return activate(y).contiguous(memory_format=torch.channels_last_3d)


class EncoderBlock(nn.Module):
    """Pre-activation convolution, attention, and a normalised 1x1x1 shortcut around both."""

    def __init__(
        self, in_channels: int, out_channels: int, depth_kernel: int, stride: Sequence[int], attention: WindowAttention
    ) -> None:
        super().__init__()
        self.norm = BatchNorm3d(in_channels)
        self.conv = Conv3d(in_channels, out_channels, (3, 3, depth_kernel), stride)
        self.shortcut_norm = BatchNorm3d(in_channels)
        self.shortcut = Conv3d(in_channels, out_channels, POINT, stride)
        self.attention = attention

    def local(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the block computes before attention: convolution and shortcut."""
        return self.conv(activate(self.norm(x))), self.shortcut(self.shortcut_norm(x))


class DecoderBlock(nn.Module):
    """Upsampling, concatenation with the skip, pre-activation convolution, attention; no residual around the block."""

    def __init__(
        self, in_channels: int, out_channels: int, depth_kernel: int, scale: Sequence[int], attention: WindowAttention
    ) -> None:
        super().__init__()
        self.scale = tuple(scale)
        self.norm = BatchNorm3d(in_channels + out_channels)
        self.conv = Conv3d(in_channels + out_channels, out_channels, (3, 3, depth_kernel), POINT)
        self.attention = attention

    def forward(
        self, x: Tensor, skip: Tensor, prompts: tuple[AttentionPrompt, AttentionPrompt] | None = None
    ) -> Tensor:
        x = torch.cat([upsample_like(x, self.scale, skip), skip], 1)
        return self.attention(self.conv(activate(self.norm(x))), prompts)


def activate(x: Tensor) -> Tensor:
    """LeakyReLU with slope 0.01, in place: the result is all that its gradient needs."""
    return F.leaky_relu_(x, 0.01)


class BottleneckAdapter(nn.Module):
    """Down to a quarter of the width, LeakyReLU, up again; added to its input by the attention sub-block.

    Args:
        channels: width C.
        reduction: C divided by the width of the bottleneck.
        identity: start with a zero output, so that the network starts unchanged.
    """

    def __init__(self, channels: int, reduction: int = 4, identity: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(channels, channels // reduction)
        self.up = nn.Linear(channels // reduction, channels)
        if identity:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(activate(self.down(x)))
