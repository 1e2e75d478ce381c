"""What happens to the tokens of a vision transformer: how large they are, which stick out, and what a scaling does to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.nets import ViT
from torch import Tensor, nn

from monai_petl.core.observe import observe
from monai_petl.core.roles import vision_transformers

__all__ = ["ScalingConditions", "expected_calibration_error", "outliers", "scaling_conditions", "token_norms"]


def token_norms(network: nn.Module, image: Tensor) -> Tensor:
    """Euclidean norms of all tokens behind every block, after the transformer's last norm: (L, B, N), the class token first.

    Args:
        network: with a ``ViT``; put it into evaluation mode first.
        image: what it takes, (B, C, ...).

    Raises:
        TypeError: it has none.
    """
    found = [transformer for _, transformer in vision_transformers(network) if isinstance(transformer, ViT)]
    if not found:
        raise TypeError(f"token norms need a vision transformer (MONAI's ViT or UNETR), got {type(network).__name__}")
    vit: Any = found[0]
    return observe(network, image, vit.blocks, lambda _, __, tokens: vit.norm(tokens).norm(dim=2))


def outliers(norms: Tensor, factor: float = 6.0) -> Tensor:
    """Which norms stand out: above the median by ``factor`` median absolute deviations, among the last axis. Booleans."""
    median = norms.median(-1, keepdim=True).values
    deviation = (norms - median).abs().median(-1, keepdim=True).values
    return norms > median + factor * deviation


@dataclass(frozen=True)
class ScalingConditions:
    """Shares of the pairs of one class that meet the conditions of the paper's first lemma.

    Attributes:
        shrinks_large: (A) of the two, the larger one is scaled by no more.
        keeps_order: (B) the larger one stays the larger.
        both: both.
    """

    shrinks_large: float
    keeps_order: float
    both: float


def scaling_conditions(norms: Tensor, scales: Tensor, labels: Tensor) -> ScalingConditions:
    """Does a scaling bring samples of a class together as the lemma wants? A diagnosis: it is for features of one sign.

    Args:
        norms: (n,), of the features before.
        scales: (n,), 0 to 1.
        labels: (n,).
    """
    size, scale = (norms[:, None] - norms[None]), (scales[:, None] - scales[None])
    after = (norms * scales)[:, None] - (norms * scales)[None]
    pairs = (labels[:, None] == labels[None]).triu(1)
    first, second = (scale * size <= 0)[pairs], (after * size >= 0)[pairs]
    return ScalingConditions(*(float(met.double().mean()) for met in (first, second, first & second)))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy (C. Guo et al., arXiv:1706.04599).

    Args:
        probabilities: (n, K).
        labels: (n,).
        bins: of the confidence, equally wide.
    """
    confidence, said = probabilities.max(1)
    right = (said == labels).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.double, device=place.device).index_add_(0, place, confidence.double() - right)
    return float(gap.abs().sum() / len(labels))
