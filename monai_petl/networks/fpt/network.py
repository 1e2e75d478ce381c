"""FPT and FPT+: a side network classifies an image at low resolution, with what a frozen transformer saw at high resolution.

Y. Huang, P. Cheng, R. Tam, X. Tang, "Fine-grained Prompt Tuning: A Parameter and Memory Efficient Transfer Learning Method for
High-resolution Medical Image Classification" (arXiv:2403.07576, MICCAI 2024), and "FPT+" (arXiv:2408.02426, IEEE TNNLS 36(9),
17280-17294, 2025). In 2D as published, and in 3D, where the same holds for volumes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from monai.networks.layers import Conv
from monai.networks.nets import ViT
from torch import Tensor, nn
from torch.nn import functional as F

from monai_petl.data.feature_cache import weights_digest
from monai_petl.networks.fpt.frozen_taps import SCORES, Taps, kept_tokens, read_taps, trained_size
from monai_petl.networks.vit.backbone import set_eps
from monai_petl.networks.vit.parts import ViTNetwork, headless, resize_positions, side_block, token_grid
from monai_petl.networks.vit.patches import patch_of

__all__ = ["FPT", "FPT_VARIANTS", "Fusion", "SideClassifier"]

EPS = 1e-12  # of the layer norms of the side network, as in the published checkpoints
OFFSET = 0.1  # in the resizing of positions


@dataclass(frozen=True)
class Variant:
    """What tells FPT from FPT+.

    Attributes:
        first: share of the backbone's blocks that is not tapped.
        side_size: pixels along each axis of the side network's image.
        wide: prompts as wide as the backbone, with a norm in front of the attention and the residual before the projection;
            else as wide as the side network, with a linear layer in front and the residual behind.
        prompted: whether the backbone is read at all.
    """

    first: float
    side_size: int
    wide: bool = True
    prompted: bool = True


FPT_VARIANTS = {
    "fpt": Variant(0.0, 224, wide=False),
    "fpt_plus": Variant(0.5, 128),
    "side": Variant(0.5, 128, prompted=False),
}
RESIDUALS = {
    "inside": "before the dropout, the latest form",
    "outside": "behind the dropout, of FPT from April 2024",
    "none": "no residual, of FPT from March 2024",
}


class FPT(ViTNetwork):
    """Scores of classes from an image at two resolutions.

    ``adapt(network, [], also_train=["side"])`` trains the side network with the fusion module. No gradient enters the
    backbone, so what it says of an image (:meth:`encode`) can be computed once and stored.

    Args:
        backbone: a MONAI ``ViT`` with a class token, 2D or 3D, for images of any size: its square (cubic) table of positions is
            resized.
        num_classes: K.
        img_size: pixels or voxels of the backbone's image.
        variant: ``fpt``, ``fpt_plus``, or ``side``: the side network of ``fpt_plus`` without the backbone, for comparison.
        side_size: pixels or voxels of the side network's image; default 224 (``fpt``) or 128 (``fpt_plus``) along each axis of
            an image, half of ``img_size`` for volumes.
        layers: the tapped blocks; default all (``fpt``) or the last half (``fpt_plus``).
        num_prompts: for each tapped block.
        token_ratio: share of the backbone's tokens that is kept in each head.
        score: which tokens are important, a key of :data:`monai_petl.networks.fpt.frozen_taps.SCORES`.
        side_width, side_heads: of the side network, whose perceptrons are four times as wide.
        side_patch: of the side network; default the backbone's.
        dropout: on what the fusion module gives.
        residual: of the prompts, a key of :data:`RESIDUALS`.

    Raises:
        TypeError: the backbone is no ``ViT``.
        ValueError: it has no class token, or an option does not fit.

    Example::

        backbone = ViT(3, (384, 384), (16, 16), spatial_dims=2, classification=True, qkv_bias=True)
        network = adapt(FPT(backbone, 5, (512, 512), variant="fpt_plus"), [], also_train=["side"])
        scores = network(torch.rand(2, 3, 512, 512))  # (2, 5)
    """

    HEAD = "side"

    def __init__(
        self,
        backbone: ViT,
        num_classes: int,
        img_size: Sequence[int],
        *,
        variant: str = "fpt_plus",
        side_size: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
        num_prompts: int = 16,
        token_ratio: float = 0.2,
        score: str = "global",
        side_width: int = 96,
        side_heads: int = 12,
        side_patch: Sequence[int] | None = None,
        dropout: float = 0.5,
        residual: str = "inside",
    ) -> None:
        super().__init__()
        backbone = headless(backbone, FPT)
        patch, depth = patch_of(backbone.patch_embedding), len(backbone.blocks)
        if not hasattr(backbone, "cls_token"):
            raise ValueError("FPT needs a backbone with a class token: build the ViT with classification=True")
        for name, value, known in (
            ("variant", variant, FPT_VARIANTS),
            ("score", score, SCORES),
            ("residual", residual, RESIDUALS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        if not 0 < token_ratio <= 1:
            raise ValueError(f"token_ratio must be above 0 and at most 1, got {token_ratio}")
        chosen = FPT_VARIANTS[variant]
        self.layers = tuple(range(int(chosen.first * depth), depth) if layers is None else layers)
        if not self.layers or list(self.layers) != sorted({*self.layers} & {*range(depth)}):
            raise ValueError(f"layers must be ascending numbers of blocks, 0 to {depth - 1}; got {list(self.layers)}")
        self.img_size, self.token_ratio, self.score = tuple(img_size), token_ratio, score
        default = (chosen.side_size,) * 2 if len(patch) == 2 else tuple(extent // 2 for extent in img_size)
        self.side_size = tuple(side_size or default)
        self._trained_size = trained_size(backbone, self.img_size)
        hidden_size = backbone.patch_embedding.position_embeddings.shape[2]
        heads = backbone.blocks[0].attn.num_heads
        fusion = None
        if chosen.prompted:
            fusion = Fusion(
                len(self.layers), num_prompts, hidden_size, heads, side_width, chosen.wide, dropout, residual
            )
        self.backbone = backbone
        self.side = SideClassifier(
            backbone.patch_embedding.patch_dim // math.prod(patch),
            num_classes,
            self.side_size,
            side_patch or patch,
            len(self.layers),
            width=side_width,
            num_heads=side_heads,
            fusion=fusion,
        )

    def forward(
        self,
        image: Tensor,
        key_states: Tensor | None = None,
        value_states: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            image: (B, C, *img_size), or (B, C, *side_size) where the backbone's part comes besides.
            key_states, value_states: (B, L, heads, M, channels of a head) of :meth:`encode`, stored.
            source: (B, C, *img_size), from which they are computed.

        Returns:
            Scores (B, K).

        Raises:
            ValueError: the image has another size; in training, something in the backbone is set to train.
        """
        if self.training and any(parameter.requires_grad for parameter in self.backbone.parameters()):
            raise ValueError(
                "no gradient enters the backbone of FPT, but some of it is set to train; use adapt(network, [], "
                "also_train=['side']), or method 'head' in a bundle"
            )
        if (key_states is None) != (value_states is None):
            raise ValueError("key_states and value_states come together; only one of them was given")
        if self.side.fusion is not None and key_states is None:
            large = image if source is None else source
            if tuple(large.shape[2:]) != self.img_size:
                raise ValueError(
                    f"the frozen transformer of this network sees images of {self.img_size}, got "
                    f"{list(large.shape[2:])}; resize them, or give stored features besides"
                )
            key_states, value_states = self.encode(large)
        return self.side(self.at_side_size(image), key_states, value_states)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the important tokens of all tapped blocks, (B, L, heads, M, channels of a head) each."""
        taps = self.taps(image)
        return taps.keys.movedim(0, 1), taps.values.movedim(0, 1)

    def taps(self, image: Tensor) -> Taps:
        """All that is known of the important tokens; the axis of the tapped blocks comes first."""
        return read_taps(self.backbone, image, self.layers, self._trained_size, self.token_ratio, self.score, OFFSET)

    def encoding(self) -> dict[str, Any]:
        """All that :meth:`encode` depends on besides the image, for :class:`monai_petl.data.FeatureCache`."""
        patch, vit = patch_of(self.backbone.patch_embedding), self.backbone
        return {
            "weights": weights_digest(vit),
            "patch_size": list(patch),
            "num_heads": vit.blocks[0].attn.num_heads,
            "norm_eps": vit.norm.eps,
            "img_size": list(self.img_size),
            "layers": list(self.layers),
            "token_ratio": self.token_ratio,
            "score": self.score,
        }

    def backbone_size(self) -> tuple[int, ...]:
        return self._trained_size

    def states_shape(self) -> tuple[int, int, int, int]:
        """(L, heads, M, channels of a head) of an image of ``img_size``."""
        patch, attention = patch_of(self.backbone.patch_embedding), self.backbone.blocks[0].attn
        tokens = 1 + math.prod(extent // side for extent, side in zip(self.img_size, patch, strict=True))
        return len(self.layers), attention.num_heads, kept_tokens(tokens, self.token_ratio), attention.dim_head

    def at_side_size(self, image: Tensor) -> Tensor:
        """The image as the side network sees it, (B, C, *side_size)."""
        if tuple(image.shape[2:]) == self.side_size:
            return image
        if tuple(image.shape[2:]) != self.img_size:
            raise ValueError(
                f"this network takes images of {self.img_size}, or of {self.side_size} beside stored features; got "
                f"{list(image.shape[2:])}. Resize them"
            )
        if image.ndim == 4:
            return F.interpolate(image, self.side_size, mode="bilinear", antialias=True)
        return F.interpolate(image, self.side_size, mode="area")


class Fusion(nn.Module):
    """Prompts of every tapped block attend to the keys and values that were kept of it.

    Keys and values are the frozen transformer's own; projections and norm are shared by all blocks.

    Args:
        layers: L, tapped blocks.
        num_prompts: P of each.
        hidden_size, num_heads: of the backbone.
        width: of the side network.
        wide: see :class:`Variant`.
        dropout: on the result.
        residual: a key of :data:`RESIDUALS`.
    """

    def __init__(
        self,
        layers: int,
        num_prompts: int,
        hidden_size: int,
        num_heads: int,
        width: int,
        wide: bool,
        dropout: float = 0.5,
        residual: str = "inside",
    ) -> None:
        super().__init__()
        self.wide, self.residual, self.num_heads = wide, residual, num_heads
        self.prompts = nn.Parameter(1e-6 * torch.randn(layers, 1, num_prompts, hidden_size if wide else width))
        self.enter = nn.LayerNorm(hidden_size) if wide else nn.Linear(width, hidden_size)
        self.out_proj = nn.Linear(hidden_size, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Keys and values (L, B, heads, M, channels of a head) -> prompts for every block, (L, B, P, width)."""
        queries = rearrange(self.enter(self.prompts), "l b p (h c) -> l b h p c", h=self.num_heads)
        states = [queries.expand(-1, keys.shape[1], -1, -1, -1), keys, values]
        by_image = not keys.is_contiguous()  # so are stored features, and joining two axes must not copy them
        if by_image:
            states = [tensor.transpose(0, 1) for tensor in states]
        q, k, v = (tensor.flatten(0, 1) for tensor in states)
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # fused attention would make gradients of k and v
        read = rearrange((weights @ v).unflatten(0, states[0].shape[:2]), "m n h p c -> m n p (h c)")
        read = read.transpose(0, 1) if by_image else read  # (L, B, P, hidden size)
        if self.residual == "none":
            return self.dropout(self.out_proj(read))
        if self.wide:
            return self.dropout(self.out_proj(read + self.prompts))
        if self.residual == "outside":
            return self.dropout(self.out_proj(read)) + self.prompts
        return self.dropout(self.out_proj(read) + self.prompts)


class SideClassifier(nn.Module):
    """A narrow vision transformer whose blocks read the prompts of the fusion module, a set for each.

    Args:
        in_channels: of the image.
        num_classes: K.
        img_size: pixels or voxels that positions are made for; other sizes work, positions are resized.
        patch_size: of the image.
        depth: blocks.
        width, num_heads: of the blocks.
        fusion: the fusion module; without it the blocks read no prompts.
    """

    beside_backbone = True  # methods that change a backbone leave this alone

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        img_size: Sequence[int],
        patch_size: Sequence[int],
        depth: int,
        *,
        width: int,
        num_heads: int,
        fusion: Fusion | None,
    ) -> None:
        super().__init__()
        self.trained_grid = token_grid(img_size, patch_size)
        self.patch_embedding = Conv["conv", len(patch_size)](in_channels, width, tuple(patch_size), tuple(patch_size))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + math.prod(self.trained_grid), width))
        self.blocks = nn.ModuleList(side_block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        set_eps(self, EPS)
        for weight in (self.cls_token, self.positions, self.patch_embedding.weight, self.head.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        for bias in (self.patch_embedding.bias, self.head.bias):
            nn.init.zeros_(bias)
        self.fusion = fusion

    def forward(self, image: Tensor, key_states: Tensor | None = None, value_states: Tensor | None = None) -> Tensor:
        """(B, C, *size) and keys and values (B, L, heads, M, channels of a head) -> (B, K)."""
        tokens = self.embed(image)
        count = tokens.shape[1]
        prompts = self._prompts(key_states, value_states, tokens)
        for block, prompt in zip(self.blocks, prompts, strict=True):
            tokens = block(torch.cat((tokens, prompt), 1))[:, :count]
        return self.head(self.norm(tokens[:, 0]))

    def _prompts(self, key_states: Tensor | None, value_states: Tensor | None, tokens: Tensor) -> Tensor:
        """For every block, (L, B, P, width); none where the backbone is not read."""
        if self.fusion is None or key_states is None or value_states is None:
            return tokens.new_zeros(len(self.blocks), len(tokens), 0, tokens.shape[2])
        keys, values = (states.movedim(1, 0).to(tokens.dtype) for states in (key_states, value_states))
        return self.fusion(keys, values)

    def embed(self, image: Tensor) -> Tensor:
        """(B, 1 + patches, width)."""
        patches = self.patch_embedding(image)
        table = resize_positions(self.positions[:, 1:], self.trained_grid, patches.shape[2:], OFFSET)
        cls = (self.cls_token + self.positions[:, :1]).expand(image.shape[0], -1, -1)
        return torch.cat((cls, patches.flatten(2).mT + table), 1)
