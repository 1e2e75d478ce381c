"""The parts of AIM at one block: adapters along depth, in the plane and at the MLP, and the embedding of slices.

T. Yang et al., arXiv:2302.03024, section 3; see :class:`monai_petl.methods.AIM`. Shapes are those of a ``ViT``, tokens
(B * D, N, C); the maps (B * D, H, W, C) of a ``SwinTransformer`` go the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from monai.networks.blocks import TransformerBlock
from monai.networks.blocks.selfattention import SABlock
from monai.networks.layers import DropPath
from monai.networks.nets.swin_unetr import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from monai_petl.core.deltas import Delta
from monai_petl.networks.vit.slices import Slices

__all__ = ["JointAdapter", "SliceEmbedding", "SpatialAdapter", "TemporalStep"]


class Bottleneck(nn.Module):
    """A(x) = up(gelu(down(x))), C -> h -> C; zero at the start, since ``up`` is."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x)))


class SpatialAdapter(Delta):
    """y + A(y), where y is what the attention in the plane gives."""

    tag = "spatial_adapter"

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.bottleneck = Bottleneck(width, hidden)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bottleneck(y)


class JointAdapter(Delta):
    """y + p(s A(x)), where x is what the MLP reads and y what it gives; p drops single slices, which it sees alone."""

    tag = "joint_adapter"

    def __init__(self, width: int, hidden: int, scale: float, drop_path: float) -> None:
        super().__init__()
        self.bottleneck, self.scale, self.drop_path = Bottleneck(width, hidden), scale, DropPath(drop_path)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.drop_path(self.scale * self.bottleneck(x))


class AlongDepth(Delta):
    """A delta that knows which slices belong together.

    Args:
        slices: what the network around the transformer says, shared by the deltas of one transformer.
        num_slices: D of the trained tensors, and of volumes where the network does not say.
        interpolate: whether D may be another than that.
    """

    def __init__(self, slices: Slices, num_slices: int, interpolate: bool) -> None:
        super().__init__()
        self.slices, self.num_slices, self.interpolate = slices, num_slices, interpolate

    def depth(self, x: Tensor) -> int:
        """D of the volumes in a batch of slices.

        Raises:
            ValueError: the batch is no whole number of volumes, or D may not be another than ``num_slices``.
        """
        depth = self.slices.count or self.num_slices
        if x.shape[0] % depth:
            raise ValueError(
                f"a batch of {x.shape[0]} slices is no whole number of volumes of {depth} slices; give all slices of a volume "
                "next to each other, or whole volumes (B, C, H, W, D) to AIMViT, AIMSwin or ViTSegmenter"
            )
        if depth != self.num_slices and not self.interpolate:
            raise ValueError(
                f"AIM has num_slices={self.num_slices} and interpolate=False, got a volume of {depth} slices; slide a window "
                f"of {self.num_slices} slices (SlidingWindowInferer), or set interpolate=True"
            )
        return depth


class SliceEmbedding(AlongDepth):
    """Adds a vector for each slice to all of its tokens, class token included; zero at the start."""

    tag = "slice"

    def __init__(self, slices: Slices, num_slices: int, interpolate: bool, width: int) -> None:
        super().__init__(slices, num_slices, interpolate)
        self.embedding = nn.Parameter(torch.zeros(num_slices, width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        depth = self.depth(y)
        table = _resized(self.embedding, depth).to(y)  # (D, C)
        return (y.unflatten(0, (-1, depth)) + table[:, None]).flatten(0, 1)

    def around(self, block: nn.Module, run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return run(self(x, x), *args, **kwargs)


class TemporalStep(AlongDepth):
    """x + p(A(attention over slices(norm1(x)))), then the block, whose norm and attention these are; p drops volumes.

    Args:
        slices, num_slices, interpolate: see :class:`AlongDepth`.
        width, hidden: C and h.
        adapters: with 2, another adapter stands between norm and attention: x + A(x).
        drop_path: p.
        heads: of the attention, for a table (2D - 1, heads) of biases by offset along depth; 0 for none.
    """

    tag = "temporal_adapter"

    def __init__(
        self,
        slices: Slices,
        num_slices: int,
        interpolate: bool,
        width: int,
        hidden: int,
        adapters: int = 1,
        drop_path: float = 0.0,
        heads: int = 0,
    ) -> None:
        super().__init__(slices, num_slices, interpolate)
        self.bottleneck_in = Bottleneck(width, hidden) if adapters == 2 else None
        self.bottleneck = Bottleneck(width, hidden)
        self.bias_table = nn.Parameter(torch.zeros(2 * num_slices - 1, heads)) if heads else None
        self.drop_path = DropPath(drop_path)

    def around(
        self,
        block: TransformerBlock | SwinTransformerBlock,
        run: Callable[..., Tensor],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        depth = self.depth(x)
        tokens = block.norm1(x).flatten(1, -2)  # (B * D, N, C)
        lines = rearrange(tokens, "(b d) n c -> (b n) d c", d=depth)
        if self.bottleneck_in is not None:
            lines = lines + self.bottleneck_in(lines)
        lines = self.bottleneck(_attention(block.attn, lines, self.biases(depth)))
        step = rearrange(lines, "(b n) d c -> b d n c", n=tokens.shape[1])
        return run(x + self.drop_path(step).reshape(x.shape), *args, **kwargs)

    def biases(self, depth: int) -> Tensor | None:
        """(heads, D, D), for query and key; fewer slices take the middle of the table, where the offsets are the same."""
        if self.bias_table is None:
            return None
        spare = max(self.num_slices - depth, 0)
        table = _resized(self.bias_table[spare : len(self.bias_table) - spare], 2 * depth - 1)
        place = torch.arange(depth, device=table.device)
        return table[place[:, None] - place + depth - 1].permute(2, 0, 1)


def _attention(attention: SABlock | WindowAttention, x: Tensor, biases: Tensor | None) -> Tensor:
    """Self-attention by the layers of a frozen module, without what belongs to the plane: relative positions and masks.

    Args:
        x: (B * N, D, C).
        biases: (heads, D, D) on the logits.
    """
    if isinstance(attention, SABlock) and not attention.use_combined_linear:
        parts = (attention.to_q(x), attention.to_k(x), attention.to_v(x))
    else:
        parts = attention.qkv(x).chunk(3, -1)
    q, k, v = (rearrange(part, "b d (h c) -> b h d c", h=attention.num_heads) for part in parts)
    mask = None if biases is None else biases.to(q)
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scale)
    project = attention.out_proj if isinstance(attention, SABlock) else attention.proj
    return project(rearrange(heads, "b h d c -> b d (h c)"))


def _resized(table: Tensor, rows: int) -> Tensor:
    """(rows, C) from another number of rows, linearly, the ends on the ends."""
    if len(table) == rows:
        return table
    return F.interpolate(table.T[None], rows, mode="linear", align_corners=True)[0].T
