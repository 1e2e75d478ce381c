"""Bottleneck adapters beside the MLP of every transformer block.

S. Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", arXiv:2205.13535 (2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from monai.networks.blocks import MLPBlock
from torch import Tensor, nn

from monai_petl.core.deltas import Delta, add_delta
from monai_petl.core.method import Method
from monai_petl.core.roles import transformer_blocks
from monai_petl.methods.parts.foreign_attention import require_known_blocks

__all__ = ["FFNAdapter", "FFNAdapterDelta"]


class FFNAdapterDelta(Delta):
    """mlp(x) + s up(relu(down(x))), or on y = mlp(x) in place of x. Zero at the start, since ``up`` is.

    Args:
        width: C, channels of the block.
        bottleneck: m, inner width.
        scale: s; ``None`` for one learned scalar that starts at 1.
        mode: ``"parallel"`` (reads the MLP's input) or ``"sequential"`` (its output).
        norm: a layer norm before (``"in"``) or after (``"out"``, behind the scale) the adapter, or ``"none"``.
        dropout: on the bottleneck.
    """

    tag = "ffn"

    def __init__(
        self,
        width: int,
        bottleneck: int,
        scale: float | None = 0.1,
        mode: str = "parallel",
        norm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.norm_in = nn.LayerNorm(width) if norm == "in" else nn.Identity()
        self.norm_out = nn.LayerNorm(width) if norm == "out" else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.parallel = mode == "parallel"
        self.scale = nn.Parameter(torch.ones(1)) if scale is None else scale
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inner = self.dropout(torch.relu(self.down(self.norm_in(x if self.parallel else y))))
        return y + self.norm_out(self.up(inner) * self.scale)


@dataclass(frozen=True)
class FFNAdapter(Method):
    """A bottleneck C -> m -> C with ReLU beside the MLP of every block of a ViT, UNETR or SwinUNETR. Cannot be merged.

    The identity at the start. 2 C m + m + C values a block (2 C more with a norm).

    Args:
        bottleneck: m.
        scale: factor of what is added; ``None`` for a learned one that starts at 1.
        mode: ``"parallel"`` or ``"sequential"``.
        norm: ``"none"``, ``"in"`` or ``"out"``.
        dropout: on the bottleneck, in training.

    Raises:
        TypeError: the network has no transformer blocks.
        ValueError: an argument is out of range.
    """

    bottleneck: int = 64
    scale: float | None = 0.1
    mode: str = "parallel"
    norm: str = "none"
    dropout: float = 0.0

    def attach(self, network: nn.Module, name: str) -> None:
        if not isinstance(self.bottleneck, int) or self.bottleneck < 1:
            raise ValueError(f"bottleneck must be a whole number of at least 1, got {self.bottleneck!r}")
        if self.mode not in ("parallel", "sequential"):
            raise ValueError(f"mode must be 'parallel' or 'sequential', got {self.mode!r}")
        if self.norm not in ("none", "in", "out"):
            raise ValueError(f"norm must be 'none', 'in' or 'out', got {self.norm!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        blocks = transformer_blocks(network)
        require_known_blocks(network, blocks)
        for _, block in blocks:
            mlp = cast(MLPBlock, block.mlp)
            width = mlp.linear2.out_features
            add_delta(
                mlp, FFNAdapterDelta(width, self.bottleneck, self.scale, self.mode, self.norm, self.dropout), name
            )
