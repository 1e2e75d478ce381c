"""A trained scale and shift behind the layers of a frozen network.

D. Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", arXiv:2210.08823 (2022).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from monai_petl.core.deltas import Delta, add_delta
from monai_petl.core.method import Method
from monai_petl.core.roles import CONVOLUTIONS, NORMS, TRANSPOSED, find_sites, has_attention
from monai_petl.methods.parts.foreign_attention import layers_of_file, require_known_layers

__all__ = ["SSF"]


class SSFDelta(Delta):
    """scale * y + shift, a value of each for every channel."""

    tag = "ssf"

    def __init__(self, channels: int, channel_dim: int, published: bool) -> None:
        super().__init__()
        self.last = channel_dim == -1
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        if published:
            nn.init.normal_(self.scale, 1.0, 0.02)
            nn.init.normal_(self.shift, 0.0, 0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.last:
            return torch.addcmul(self.shift, y, self.scale)
        shape = [1, -1] + [1] * (y.ndim - 2)
        return torch.addcmul(self.shift.view(shape), y, self.scale.view(shape))

    def merged_parameters(self, layer: nn.Module) -> dict[str, Tensor]:
        owner: Any = layer
        if owner.bias is None:
            raise ValueError("has no bias that could take the shift of SSF; keep the adapter attached")
        scale, weight = self.scale, owner.weight
        if isinstance(layer, TRANSPOSED):
            by_group = weight.unflatten(0, (owner.groups, -1))  # (G, inputs / G, outputs / G, *kernel)
            stretched = (by_group * scale.view(owner.groups, 1, -1, *[1] * (weight.ndim - 2))).flatten(0, 1)
        else:
            stretched = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        return {"weight": stretched, "bias": owner.bias * scale + self.shift}


@dataclass(frozen=True)
class SSF(Method):
    """y -> scale * y + shift, channel by channel. The identity at the start; merges where the layer has a bias.

    Args:
        targets: roles or patterns as in :class:`monai_petl.methods.LoRA`; default everything that the transformer of the
            network consists of (projections, MLP, patch embedding, merging, norms), or else all convolutions and norms.
            A network with attention of another library has no default: its layers are listed.
        exclude: patterns of names to leave out.
        init: ``"identity"``, or ``"published"`` (deviation 0.02 around it).

    Raises:
        ValueError: a target finds nothing, or there is no default for the network.
    """

    targets: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    init: str = "identity"

    def attach(self, network: nn.Module, name: str) -> None:
        if self.init not in ("identity", "published"):
            raise ValueError(f"init must be 'identity' or 'published', got {self.init!r}")
        kinds = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *NORMS)
        for site in find_sites(network, self._targets(network), self.exclude, kinds):
            layer: Any = site.layer
            if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
                raise TypeError(f"SSF scales channels; {site.name} normalises {layer.normalized_shape} values at once")
            if site.slots and len(site.slots) < 3:
                raise ValueError(
                    f"SSF scales the whole of {site.name}, which makes queries, keys and values; give all of 'q', 'k' and 'v'"
                )
            dim = -1 if isinstance(layer, nn.Linear | nn.LayerNorm) else 1
            delta = SSFDelta(_channels(layer), dim, self.init == "published")
            like = next(network.parameters(), delta.scale)  # a norm may have no parameters to go by
            add_delta(layer, delta.to(like), name)

    def as_saved(self, network: nn.Module, tensors: Collection[str]) -> SSF:
        return self if self.targets else replace(self, targets=layers_of_file(network, tensors, "ssf"))

    def _targets(self, network: nn.Module) -> Sequence[str]:
        if self.targets is not None:
            return self.targets
        require_known_layers(network)
        return ["transformer" if has_attention(network) else "convolutional"]


def _channels(layer: Any) -> int:
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[0]
    names = ("out_features", "out_channels", "num_features", "num_channels")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))
