"""Low-rank adaptation of linear layers, attention projections and convolutions, in place and exactly mergeable.

E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685 (2021). The scale of rsLoRA is from
D. Kalajdzievski, arXiv:2312.03732 (2023), DoRA from S.-Y. Liu et al., arXiv:2402.09353 (2024).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from monai_petl.adapt import Method
from monai_petl.deltas import add_delta
from monai_petl.methods.lora_layers import largest_rank, lora_delta
from monai_petl.methods.targets import Site, backbone_modules, find_sites, has_attention

__all__ = ["LoRA"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoRA(Method):
    """y = W x + b + g B A x with W and b frozen, A (r, inputs), B (outputs, r) and g = alpha / r. The identity at the start.

    Args:
        rank: r.
        alpha: numerator of the scale.
        targets: roles (``"q"``, ``"v"``, ``"mlp"``, ``"conv"``, ... see :data:`monai_petl.methods.ROLES`), presets
            (``"attention"``, ``"all-linear"``, ``"all-conv"``) or glob patterns of whole layer names. Default: q and v where
            the network has attention (ViT, UNETR, SwinUNETR), all convolutions elsewhere (UNet, SegResNet, DynUNet).
        exclude: patterns of names to leave out.
        dropout: on the input of the low-rank path, in training.
        init: of A: ``"kaiming"`` (uniform within 1 / sqrt(inputs), as the authors' code) or ``"gaussian"`` (deviation 1 / r).
        rslora: scale by alpha / sqrt(r).
        dora: train the length of each row of the weight besides (DoRA).
        shared_a: one A for all of q, k and v of a fused projection, all three adapted, as the peft library does.
        rank_pattern: other ranks for some layers, by glob pattern of their names; the first that matches counts.
        bias: ``"none"``, ``"lora_only"`` (biases of the adapted layers train) or ``"all"`` (all of the network's).

    Raises:
        ValueError: rank below 1 or larger than every layer's own, a pattern that finds nothing (the nearest names are given).
        TypeError: a pattern finds layers that cannot be adapted.

    Example::

        network = adapt(SwinUNETR(1, 3, feature_size=24), LoRA(rank=8), also_train=["decoder*", "out"])
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    dropout: float = 0.0
    init: str = "kaiming"
    rslora: bool = False
    dora: bool = False
    shared_a: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    bias: str = "none"

    def attach(self, network: nn.Module, name: str) -> None:
        self._check()
        sites = find_sites(network, self._targets(network), self.exclude)
        for pattern in self.rank_pattern:
            if not any(fnmatchcase(site.name, pattern) for site in sites):
                raise ValueError(
                    f"rank_pattern: none of the {len(sites)} adapted layers is called {pattern!r}; they are: {_some(sites)}"
                )
        small = [site for site in sites if largest_rank(site) <= self.rank_of(site.name)]
        if len(small) == len(sites):
            largest = max(largest_rank(site) for site in sites)
            raise ValueError(
                f"rank {self.rank} is not below that of any of the {len(sites)} layers found ({_some(sites)}), so that nothing "
                f"would be saved; give a rank below {largest}"
            )
        if small:
            warnings.warn(
                f"rank {self.rank} saves nothing in {len(small)} of {len(sites)} layers, which are left out: {_some(small)}",
                stacklevel=4,
            )
        for site in sites:
            if site not in small:
                rank = self.rank_of(site.name)
                scale = self.alpha / (math.sqrt(rank) if self.rslora else rank)
                gaussian = self.init == "gaussian"
                delta = lora_delta(site, rank, scale, self.dropout, gaussian, self.shared_a, self.dora)
                add_delta(site.layer, delta, name)
        layers = [site.layer for site in sites if site not in small]
        for layer in {"none": [], "lora_only": layers, "all": [m for _, m in backbone_modules(network)]}[self.bias]:
            bias = getattr(layer, "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.requires_grad_(True)
        logger.info("LoRA on %d layers", len(layers))

    def rank_of(self, layer: str) -> int:
        """The rank for the layer of this name."""
        return next((r for pattern, r in self.rank_pattern.items() if fnmatchcase(layer, pattern)), self.rank)

    def _targets(self, network: nn.Module) -> Sequence[str]:
        if self.targets is not None:
            return self.targets
        return ["q", "v"] if has_attention(network) else ["all-conv"]

    def _check(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"init must be 'kaiming' or 'gaussian', got {self.init!r}")
        if self.bias not in ("none", "lora_only", "all"):
            raise ValueError(f"bias must be 'none', 'lora_only' or 'all', got {self.bias!r}")


def _some(sites: Sequence[Site], count: int = 3) -> str:
    more = f" and {len(sites) - count} more" if len(sites) > count else ""
    return ", ".join(site.name for site in sites[:count]) + more
