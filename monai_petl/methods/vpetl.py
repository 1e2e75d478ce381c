"""V-PETL: parallel attention (PATT), whose keys and values get an addition made from the layer's own input, and FFN adapters.

B. X. B. Yu et al., "Towards a Unified View on Visual Parameter-Efficient Transfer Learning", arXiv:2210.00788 (2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monai_petl.core.deltas import Delta, add_delta
from monai_petl.core.method import Method
from monai_petl.core.roles import SLOTS, attention_of
from monai_petl.methods.ffn_adapter import FFNAdapter
from monai_petl.methods.parts.foreign_attention import require_known_blocks

__all__ = ["VPETL", "PATTDelta"]


class PATTDelta(Delta):
    """q, k or v += s up(tanh(down(x))), at a fused projection (output q | k | v) or at one that makes a single one of them.

    Args:
        inputs: C, channels that attention reads.
        outputs: channels of each of q, k and v.
        slots: which thirds of the output change, ascending; ``(0,)`` with ``thirds=1`` for a projection of its own.
        bottleneck: r, inner width.
        scale: s.
        bias: whether both layers have biases.
        zero: start ``up`` at zero, so that nothing changes at first; else torch's default, as published.
        thirds: 3 for a fused projection, else 1.
        shared: the delta of the same attention whose ``down`` this one reads too.
    """

    tag = "patt"

    def __init__(
        self,
        inputs: int,
        outputs: int,
        slots: Sequence[int],
        bottleneck: int,
        scale: float,
        bias: bool,
        zero: bool,
        thirds: int = 3,
        shared: PATTDelta | None = None,
    ) -> None:
        super().__init__()
        self.slots, self.scale, self.outputs, self.thirds = tuple(slots), scale, outputs, thirds
        if shared is None:
            self.down = nn.Linear(inputs, bottleneck, bias=bias)
        else:
            self.__dict__["down"] = shared.down  # one module, saved with the other delta
        self.up = nn.Linear(bottleneck, len(self.slots) * outputs, bias=bias)
        if zero:
            nn.init.zeros_(self.up.weight)
            if bias:
                nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        d = self.scale * self.up(torch.tanh(self.down(x)))  # (..., slots * outputs)
        if len(self.slots) == self.thirds:
            return y + d
        first, last = self.slots[0], self.slots[-1]
        if last - first + 1 == len(self.slots):  # side by side: k and v, or q and k
            before, after = first * self.outputs, (self.thirds - 1 - last) * self.outputs
            return y + nn.functional.pad(d, (before, after))
        q, v = d.chunk(2, -1)
        return y + torch.cat((q, torch.zeros_like(q), v), -1)


@dataclass(frozen=True)
class VPETL(Method):
    """PATT in every attention and a parallel FFN adapter in every block of a ViT, UNETR or SwinUNETR. Cannot be merged.

    With C channels, bottleneck r and biases: 3 C r + r + 2 C values an attention for two of q, k and v.

    Args:
        targets: ``"kv"`` (the paper's choice), ``"qv"``, ``"qk"`` or ``"qkv"``.
        bottleneck: r; default ``max(8, round(C * ratio))``, since stages of a Swin transformer may be narrow.
        ratio: of r to C.
        scale: factor of what is added to q, k and v.
        bias: whether PATT has biases; default as the projection that it belongs to.
        init: ``"zero"`` (the identity at the start) or ``"published"`` (torch's default for linear layers).
        ffn_bottleneck: inner width of the FFN adapters; ``None`` for none.
        ffn_scale: factor of what they add.

    Raises:
        TypeError: the network has no attention.
        ValueError: an argument is out of range.
    """

    targets: str = "kv"
    bottleneck: int | None = None
    ratio: float = 0.25
    scale: float = 0.8
    bias: bool | None = None
    init: str = "zero"
    ffn_bottleneck: int | None = 64
    ffn_scale: float = 0.1

    def attach(self, network: nn.Module, name: str) -> None:
        if self.targets not in ("kv", "qv", "qk", "qkv"):
            raise ValueError(f"targets must be 'kv', 'qv', 'qk' or 'qkv', got {self.targets!r}")
        if self.init not in ("zero", "published"):
            raise ValueError(f"init must be 'zero' or 'published', got {self.init!r}")
        if self.bottleneck is not None and (not isinstance(self.bottleneck, int) or self.bottleneck < 1):
            raise ValueError(f"bottleneck must be a whole number of at least 1, got {self.bottleneck!r}")
        if self.ratio <= 0:
            raise ValueError(f"ratio must be above 0, got {self.ratio}")
        attentions = attention_of(network)
        require_known_blocks(network, attentions)
        for _, attention in attentions:
            if isinstance(attention.qkv, nn.Linear):
                outputs = attention.qkv.out_features // 3
                slots = [SLOTS[target] for target in self.targets]
                add_delta(attention.qkv, self._delta(attention.qkv, outputs, slots, 3), name)
            else:
                shared: PATTDelta | None = None
                for target in self.targets:
                    layer: Any = getattr(attention, f"to_{target}")
                    delta = self._delta(layer, layer.out_features, (0,), 1, shared)
                    add_delta(layer, delta, name)
                    shared = shared or delta
        if self.ffn_bottleneck is not None:
            FFNAdapter(self.ffn_bottleneck, self.ffn_scale).attach(network, name)

    def _delta(
        self, layer: nn.Linear, outputs: int, slots: Sequence[int], thirds: int, shared: PATTDelta | None = None
    ) -> PATTDelta:
        width = layer.in_features
        bottleneck = self.bottleneck or max(8, round(width * self.ratio))
        bias = layer.bias is not None if self.bias is None else self.bias
        zero = self.init == "zero"
        return PATTDelta(width, outputs, slots, bottleneck, self.scale, bias, zero, thirds, shared)
