"""A classifier around any MONAI ``ViT``: a linear layer on its class token, the mean of its patch tokens, or both.

MONAI's own ``ViT(classification=True)`` reads the class token alone and returns its hidden states beside the scores; this
one returns scores, so that it goes into trainers, inferers and exports as it is. The mean of the patch tokens beside the class
token is what linear probes of self-supervised transformers read (M. Oquab et al., "DINOv2", arXiv:2304.07193).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets import ViT
from torch import Tensor, nn

from monai_petl.core.deltas import deltas_of
from monai_petl.core.records import adapters_of
from monai_petl.networks.vit.parts import ViTNetwork, headless, resize_positions, token_grid
from monai_petl.networks.vit.patches import patch_of

__all__ = ["POOLS", "ViTClassifier"]

POOLS = {"class": 1, "mean": 1, "class_mean": 2}  # how many vectors the head reads


class ViTClassifier(ViTNetwork):
    """Scores of classes from the final tokens of a vision transformer, 2D or 3D.

    All but the head belongs to the backbone: ``adapt(network, [], also_train=["head"])`` is a linear probe.

    Args:
        backbone: a MONAI ``ViT``. Its classification head, where it has one, is taken away.
        num_classes: K.
        img_size: pixels (H, W) or voxels (H, W, D) that the backbone was built for.
        pool: ``"class_mean"`` reads the class token and the mean of the patch tokens, ``"class"`` and ``"mean"`` one of them.
        dropout: rate in front of the head.
        head_layers: hidden layers of the head, as wide as its input; 0 for a linear one. With 3 it is the MLP-3 of M. Jia et
            al., "Visual prompt tuning" (arXiv:2203.12119), whose batch norms need two images a step.

    Raises:
        TypeError: the backbone is no ``ViT``.
        ValueError: there is no such pool, no class token to read, or ``head_layers`` is negative.

    Example::

        backbone = ViT(3, (224, 224), (16, 16), spatial_dims=2, classification=True, qkv_bias=True)
        scores = ViTClassifier(backbone, 3, (224, 224))(torch.rand(2, 3, 224, 224))  # (2, 3)
    """

    HEAD = "head"

    def __init__(
        self,
        backbone: ViT,
        num_classes: int,
        img_size: Sequence[int],
        *,
        pool: str = "class_mean",
        dropout: float = 0.0,
        head_layers: int = 0,
    ) -> None:
        super().__init__()
        backbone = headless(backbone, ViTClassifier)
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}; got {pool!r}")
        if pool != "mean" and not hasattr(backbone, "cls_token"):
            raise ValueError(f"pool={pool!r} reads the class token, and this ViT has none; use pool='mean'")
        if head_layers < 0:
            raise ValueError(f"head_layers must be 0 or more hidden layers, got {head_layers}")
        self.pool, self.img_size = pool, tuple(img_size)
        self.backbone = backbone
        self.patches = backbone.patch_embedding.position_embeddings.shape[1]
        self.dropout = nn.Dropout(dropout)
        width = POOLS[pool] * backbone.patch_embedding.position_embeddings.shape[2]
        self.head = _mlp(width, num_classes, head_layers) if head_layers else nn.Linear(width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *img_size) -> (B, K)."""
        return self.head(self.dropout(self.features(image)))

    @torch.no_grad()
    def resize(self, img_size: Sequence[int]) -> ViTClassifier:
        """Take images of another size from now on: positions, and prompts that are kept by position, are interpolated in place.

        Load adapters before, at the size that they were trained at, and make the optimiser afterwards.

        Args:
            img_size: a multiple of the patches along each axis.

        Raises:
            ValueError: it is none, or an adapter trains the positions.
        """
        embedding = self.backbone.patch_embedding
        patch = patch_of(embedding)
        trained, grid = token_grid(self.img_size, patch), token_grid(img_size, patch)
        for name, record in adapters_of(self).items():
            if any(tensor.endswith("position_embeddings") for tensor in record.originals):
                raise ValueError(
                    f"adapter {name!r} trains the positions; build the network for {tuple(img_size)} instead"
                )
        table = resize_positions(embedding.position_embeddings, trained, grid)
        embedding.position_embeddings = nn.Parameter(table, embedding.position_embeddings.requires_grad)
        for _, delta in deltas_of(self.backbone):
            delta.resize(trained, grid)
        self.img_size, self.patches = tuple(img_size), table.shape[1]
        return self

    def features(self, image: Tensor) -> Tensor:
        """What the head reads, (B, hidden size) or twice as wide."""
        if list(image.shape[2:]) != list(self.img_size):
            raise ValueError(
                f"this network was built for images of {self.img_size}, got {list(image.shape[2:])}; resize them"
            )
        tokens, _ = self.backbone(image)
        if self.pool == "class":
            return tokens[:, 0]
        mean = tokens[:, -self.patches :].mean(1)
        return mean if self.pool == "mean" else torch.cat((tokens[:, 0], mean), 1)


def _mlp(width: int, num_classes: int, layers: int) -> nn.Sequential:
    hidden = [
        part
        for _ in range(layers)
        for part in (nn.Linear(width, width), nn.ReLU(), nn.BatchNorm1d(width), nn.Dropout(0.1))
    ]
    last = nn.Linear(width, num_classes)
    for layer in (*hidden, last):
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            nn.init.zeros_(layer.bias)
    nn.init.constant_(last.bias, -math.log(99))  # a class is rare at the start
    return nn.Sequential(*hidden, last)
