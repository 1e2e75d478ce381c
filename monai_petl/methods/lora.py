"""Low-rank adaptation of linear layers, attention projections and convolutions, in place and exactly mergeable.

E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685 (2021). The scale of rsLoRA is from
D. Kalajdzievski, arXiv:2312.03732 (2023), DoRA from S.-Y. Liu et al., arXiv:2402.09353 (2024).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from monai_petl.core.deltas import add_delta
from monai_petl.core.method import Method
from monai_petl.core.roles import CONVOLUTIONS, TRANSPOSED, Site, backbone_modules, find_sites, has_attention
from monai_petl.methods.parts.foreign_attention import collapsed, layers_of_file, require_known_layers
from monai_petl.methods.parts.lora_layers import largest_rank, lora_delta

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
            the network has attention (ViT, UNETR, SwinUNETR), all convolutions elsewhere (UNet, SegResNet, DynUNet). A network
            with attention of another library (timm, Hugging Face, torchvision), or of linear layers (MLP-Mixer), has no
            default: its layers are listed.
        exclude: patterns of names to leave out.
        dropout: on the input of the low-rank path, in training.
        init: of A: ``"kaiming"`` (uniform within 1 / sqrt(inputs), as the authors' code) or ``"gaussian"`` (deviation 1 / r).
        rslora: scale by alpha / sqrt(r).
        dora: train the length of each row of the weight besides (DoRA).
        shared_a: one A for all of q, k and v of a fused projection, all three adapted, as the peft library does.
        rank_pattern: other ranks for some layers, by glob pattern of their names; the first that matches counts. A rank that
            saves nothing leaves a layer out when it is the common one, and holds when it is given here.
        alpha_pattern: other numerators for some layers, in the same way.
        bias: ``"none"``, ``"lora_only"`` (biases of the adapted layers train) or ``"all"`` (all of the network's).

    Raises:
        ValueError: a rank below 1 or larger than every layer's own, an alpha of 0 or below, a pattern that finds nothing (the
            nearest names are given).
        TypeError: a target finds layers that cannot be adapted.

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
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"

    def attach(self, network: nn.Module, name: str) -> None:
        self._check()
        sites = find_sites(network, self._targets(network), self.exclude)
        unfit = [site for site in sites if not isinstance(site.layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))]
        if unfit:
            raise TypeError(
                f"LoRA adapts linear layers and convolutions, and {unfit[0].name} is a {type(unfit[0].layer).__name__}; leave "
                "the role 'norm' out of targets, or exclude=['*norm*']"
            )
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, option):
                if not any(fnmatchcase(site.name, pattern) for site in sites):
                    raise ValueError(
                        f"{option}: none of the {len(sites)} adapted layers is called {pattern!r}; they are: {_some(sites)}"
                    )
        sites = self._worthwhile(sites)
        for site in sites:
            rank, alpha = self.rank_of(site.name), self.alpha_of(site.name)
            scale = alpha / (math.sqrt(rank) if self.rslora else rank)
            gaussian = self.init == "gaussian"
            delta = lora_delta(site, rank, scale, self.dropout, gaussian, self.shared_a, self.dora)
            add_delta(site.layer, delta, name)
        layers = [site.layer for site in sites]
        for layer in {"none": [], "lora_only": layers, "all": [m for _, m in backbone_modules(network)]}[self.bias]:
            bias = getattr(layer, "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.requires_grad_(True)
        logger.info("LoRA on %d layers: %s", len(layers), collapsed(site.name for site in sites))

    def rank_of(self, layer: str) -> int:
        """The rank for the layer of this name."""
        return next((r for pattern, r in self.rank_pattern.items() if fnmatchcase(layer, pattern)), self.rank)

    def alpha_of(self, layer: str) -> float:
        """The numerator of the scale for the layer of this name."""
        return next((a for pattern, a in self.alpha_pattern.items() if fnmatchcase(layer, pattern)), self.alpha)

    def _worthwhile(self, sites: Sequence[Site]) -> list[Site]:
        """Without the layers in which the common rank saves nothing."""
        small = [site for site in sites if largest_rank(site, self.shared_a) <= self.rank_of(site.name)]
        left_out = [s for s in small if not any(fnmatchcase(s.name, pattern) for pattern in self.rank_pattern)]
        if len(left_out) == len(sites):
            largest = max(largest_rank(site, self.shared_a) for site in sites)
            raise ValueError(
                f"rank {self.rank} is not below that of any of the {len(sites)} layers found ({_some(sites)}), so that nothing "
                f"would be saved; give a rank below {largest}"
            )
        for layers, what in ((left_out, ", which are left out"), ([s for s in small if s not in left_out], "")):
            if layers:
                warnings.warn(
                    f"the rank saves nothing in {len(layers)} of {len(sites)} layers{what}: {_some(layers)}",
                    stacklevel=5,
                )
        return [site for site in sites if site not in left_out]

    def as_saved(self, network: nn.Module, tensors: Collection[str]) -> LoRA:
        return self if self.targets else replace(self, targets=layers_of_file(network, tensors, "(lora|dora)"))

    def _targets(self, network: nn.Module) -> Sequence[str]:
        if self.targets is not None:
            return self.targets
        require_known_layers(network)
        return ["q", "v"] if has_attention(network) else ["all-conv"]

    def _check(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not 0 < alpha < math.inf:
                raise ValueError(f"alpha must be above 0 and finite, got {alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"init must be 'kaiming' or 'gaussian', got {self.init!r}")
        if self.bias not in ("none", "lora_only", "all"):
            raise ValueError(f"bias must be 'none', 'lora_only' or 'all', got {self.bias!r}")


def _some(sites: Sequence[Site], count: int = 3) -> str:
    more = f" and {len(sites) - count} more" if len(sites) > count else ""
    return ", ".join(site.name for site in sites[:count]) + more
