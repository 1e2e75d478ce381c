"""Biases on attention logits that MONAI's ViT has no argument for, through the hook that its ``SABlock`` calls.

``SABlock`` calls ``rel_positional_embedding(x, att_mat, q)`` on the scaled logits (B, heads, N, N) before the softmax. The
modules here go there; the network stays MONAI's ``ViT``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets import ViT
from torch import Tensor, nn

__all__ = ["ClassKeyBias", "RelativePositionBias", "add_attention_bias"]


class RelativePositionBias(nn.Module):
    """A learnt bias for every pair of tokens, read from a table by their offset (BEiT, arXiv 2106.08254).

    Args:
        grid: tokens along each spatial axis, 2D or 3D.
        num_heads: columns of the table.

    The table has a row for every offset, the product of (2g-1) over the axes, and three for the class token, which is token 0:
    class query to patch key, patch query to class key, class to class.
    """

    def __init__(self, grid: Sequence[int], num_heads: int) -> None:
        super().__init__()
        self.grid = tuple(grid)
        offsets = math.prod(2 * g - 1 for g in grid)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, num_heads))
        tokens = math.prod(grid) + 1
        index = torch.zeros(tokens, tokens, dtype=torch.int32)
        index[1:, 1:] = _offset_index(self.grid)
        index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
        self.register_buffer("index", index, persistent=False)
        self.index: Tensor

    def forward(self, x: Tensor, att_mat: Tensor, q: Tensor) -> Tensor:
        """Logits (B, heads, N, N) with the bias added; ``x`` and ``q`` are not used."""
        return att_mat + self.relative_position_bias_table[self.index].permute(2, 0, 1)


class ClassKeyBias(nn.Module):
    """A constant on the logits of the class token as key.

    With ``log(D)`` on a volume of D depth tokens, where D equal patches compete with one class token, attention is that of
    the 2D network.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value))
        self.value: Tensor

    def forward(self, x: Tensor, att_mat: Tensor, q: Tensor) -> Tensor:
        """Logits (B, heads, N, N) with the constant added to column 0; ``x`` and ``q`` are not used."""
        column = torch.zeros(att_mat.shape[-1], dtype=att_mat.dtype, device=att_mat.device)
        column[0] = self.value
        return att_mat + column


def add_attention_bias(network: ViT, kind: str, grid: Sequence[int], num_heads: int, depth: int = 1) -> None:
    """Put a bias module into every block.

    Args:
        network: changed in place.
        kind: ``table`` for :class:`RelativePositionBias`, ``class_key`` for :class:`ClassKeyBias`.
        grid: tokens along each spatial axis.
        num_heads: heads of the network.
        depth: depth tokens, for ``class_key``.
    """
    for block in network.blocks:
        module = RelativePositionBias(grid, num_heads) if kind == "table" else ClassKeyBias(math.log(depth))
        block.attn.rel_positional_embedding = module.to(block.attn.qkv.weight)
        block.attn.use_flash_attention = False  # which would pass the bias by


def _offset_index(grid: tuple[int, ...]) -> Tensor:
    """Row of the table for every pair of patches, (N, N)."""
    axes = torch.meshgrid(*(torch.arange(g) for g in grid), indexing="ij")
    places = torch.stack([a.flatten() for a in axes])  # (axes, N)
    offsets = places[:, :, None] - places[:, None, :]
    row = torch.zeros_like(offsets[0])
    for offset, g in zip(offsets, grid, strict=True):
        row = row * (2 * g - 1) + offset + g - 1
    return row
