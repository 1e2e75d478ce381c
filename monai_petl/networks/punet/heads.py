"""Output heads of PUNet: similarity with class tokens (prompted), and a plain convolution (not prompted)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from monai_petl.networks.punet.layers import BatchNorm3d, Conv3d

__all__ = ["SIMILARITIES", "ConvHead", "SimilarityHead"]

SIMILARITIES = ("soft", "mean", "top3")


class SimilarityHead(nn.Module):
    """Logit of a class at a voxel: the similarity of the voxel's embedding with the tokens of the class.

    With s = cos(embedding, token) mapped to [0, 1], a class's logit is ``logit_scale * sum_j w_j s_j``, where
    w = softmax(s / sigma) without gradient (arXiv:2211.09233, similarity aggregation). It holds no parameters.

    Args:
        aggregation: ``"soft"`` (as above), ``"mean"`` over the tokens, or ``"top3"`` (mean of the three largest).
        sigma: temperature of the soft selection.
        logit_scale: factor on the similarity. The paper's network has none, so that no probability can pass 0.88.
        published: use the published ``cos + 0.5`` (range [-0.5, 1.5]) in place of ``(cos + 1) / 2``.
    """

    def __init__(
        self, aggregation: str = "soft", *, sigma: float = 0.05, logit_scale: float = 10.0, published: bool = False
    ) -> None:
        super().__init__()
        if aggregation not in SIMILARITIES:
            raise ValueError(f"similarity must be one of {SIMILARITIES}, got {aggregation!r}")
        if sigma <= 0 or logit_scale <= 0:
            raise ValueError(f"sigma and logit_scale must be positive, got {sigma} and {logit_scale}")
        self.aggregation, self.sigma = aggregation, sigma
        self.slope, self.offset = (1.0, 0.5) if published else (0.5, 0.5)
        self.logit_scale = 1.0 if published else logit_scale

    def forward(self, embedding: Tensor, tokens: Tensor) -> Tensor:
        """Embedding (B, C, H, W, D) and tokens (B, I, T, C) -> logits (B, I, H, W, D)."""
        classes, count = tokens.shape[1:3]
        voxels = F.normalize(embedding.flatten(2).mT, dim=-1)  # (B, M, C)
        directions = F.normalize(tokens, dim=-1).flatten(1, 2)  # (B, I * T, C)
        cosine = (voxels @ directions.mT).unflatten(-1, (classes, count))  # (B, M, I, T)
        similarity = cosine * self.slope + self.offset
        if self.aggregation == "mean":
            aggregated = similarity.mean(-1)
        elif self.aggregation == "top3":
            aggregated = similarity.topk(min(3, count), dim=-1).values.mean(-1)
        else:
            weights = (similarity.detach() / self.sigma).softmax(-1)
            aggregated = (weights * similarity).sum(-1)
        return (aggregated * self.logit_scale).mT.unflatten(-1, embedding.shape[2:])


class ConvHead(nn.Sequential):
    """Batch norm, LeakyReLU and a 1x1x1 convolution: 130 parameters for 32 channels and two outputs."""

    is_adapter = True  # the head of a class is never part of the backbone
    replaced: Sequence[tuple[nn.ModuleDict, int, nn.Module]] = ()  # what a method put this head in the place of

    def __init__(self, in_channels: int = 32, out_channels: int = 2) -> None:
        super().__init__()
        self.norm = BatchNorm3d(in_channels)
        self.act = nn.LeakyReLU(0.01)
        self.conv = Conv3d(in_channels, out_channels, (1, 1, 1), (1, 1, 1))
