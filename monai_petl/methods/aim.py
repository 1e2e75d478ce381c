"""AIM: a frozen image transformer sees volumes slice by slice, with adapters along depth, in the plane and at the MLP.

T. Yang et al., "AIM: Adapting Image Models for Efficient Video Action Recognition", ICLR 2023, arXiv:2302.03024. What is
time there is depth here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from monai.networks.blocks import TransformerBlock
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer, SwinTransformerBlock
from torch import nn

from monai_petl.core.deltas import add_delta
from monai_petl.core.method import Method
from monai_petl.core.roles import vision_transformers
from monai_petl.methods.parts.aim_deltas import JointAdapter, SliceEmbedding, SpatialAdapter, TemporalStep
from monai_petl.networks.vit.patches import patch_of
from monai_petl.networks.vit.slices import slices_of

__all__ = ["AIM"]


@dataclass(frozen=True)
class AIM(Method):
    """Slices of a volume exchange through the frozen attention of a 2D ``ViT`` or ``SwinTransformer``. Cannot be merged.

    With bottlenecks A (C -> h -> C, GELU) and stochastic depth p, a block of norm1, attention, norm2 and MLP computes

    1. x <- x + p(A_T(attention over slices(norm1(x)))): the tokens of one place along depth, by the block's own attention;
    2. x <- x + y + A_S(y), where y = attention in the plane(norm1(x));
    3. x <- x + mlp(z) + p(s A_J(z)), where z = norm2(x).

    The identity at the start: the network is the 2D network on every slice. A (D, C) embedding is added to all tokens of a
    slice before the first block of a ``ViT``. A ``SwinTransformer`` has a table of biases for offsets along depth in its
    place, and step 1 in every other block. The final norm of a ``ViT`` trains too.

    Images come as (B * D, C, H, W), the slices of a volume next to each other. :class:`monai_petl.networks.AIMViT`,
    :class:`monai_petl.networks.AIMSwin` and :class:`monai_petl.networks.ViTSegmenter` take whole volumes of any D.

    Args:
        num_slices: D, of the embedding and of volumes whose D the network around the transformer does not tell.
        ratio: h / C.
        scale: s.
        drop_path: p of the last block, in training; it rises linearly from 0 at the first.
        num_temporal_adapters: with 2, another one stands before the attention over slices: x + A(x).
        temporal: step 1 and the embedding.
        spatial: A_S.
        joint: A_J.
        interpolate: resize the embedding linearly where D is another; else that is a ``ValueError``.

    Raises:
        TypeError: there is no 2D transformer.
        ValueError: an argument is out of range.
    """

    num_slices: int = 8
    ratio: float = 0.25
    scale: float = 0.5
    drop_path: float = 0.0
    num_temporal_adapters: int = 1
    temporal: bool = True
    spatial: bool = True
    joint: bool = True
    interpolate: bool = True

    def attach(self, network: nn.Module, name: str) -> None:
        self._check()
        for transformer in _planar_transformers(network):
            is_vit = isinstance(transformer, ViT)
            along_depth = (slices_of(transformer), self.num_slices, self.interpolate)
            blocks = _blocks(transformer)
            for number, (place, block) in enumerate(blocks):
                width = block.norm1.normalized_shape[0]
                hidden = self._hidden(width)
                rate = self.drop_path * number / max(len(blocks) - 1, 1)
                if self.spatial:
                    add_delta(block.attn, SpatialAdapter(width, hidden), name)
                if self.joint:
                    add_delta(block.mlp, JointAdapter(width, hidden, self.scale, rate), name)
                if self.temporal and (is_vit or place % 2 == 0):
                    heads = 0 if is_vit else block.attn.num_heads
                    step = TemporalStep(*along_depth, width, hidden, self.num_temporal_adapters, rate, heads)
                    add_delta(block, step, name)
            if is_vit:
                transformer.norm.requires_grad_(True)
            if is_vit and self.temporal:  # last, since of a block's deltas the last one comes first
                embedding = SliceEmbedding(*along_depth, transformer.norm.normalized_shape[0])
                where = getattr(transformer, "embedded", transformer.blocks[0])
                add_delta(where, embedding.to(transformer.norm.weight), name)

    def _check(self) -> None:
        for field in ("num_slices", "num_temporal_adapters"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")
        if self.num_temporal_adapters > 2:
            raise ValueError(f"num_temporal_adapters must be 1 or 2, got {self.num_temporal_adapters}")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio must be positive, got {self.ratio}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {self.drop_path}")

    def _hidden(self, width: int) -> int:
        hidden = int(self.ratio * width)
        if hidden < 1:
            raise ValueError(f"ratio={self.ratio} leaves nothing of {width} channels; choose at least {1 / width:.3g}")
        return hidden


def _planar_transformers(network: nn.Module) -> list[ViT | SwinTransformer]:
    """The 2D transformers of a network.

    Raises:
        TypeError: there are none.
    """
    found = [transformer for _, transformer in vision_transformers(network)]
    planar = [transformer for transformer in found if len(_patch(transformer)) == 2]
    if not planar:
        has = f"has a 3D {type(found[0]).__name__}" if found else "has no transformer of MONAI"
        raise TypeError(
            f"AIM needs a 2D ViT or SwinTransformer, which sees single slices; this {type(network).__name__} {has}. Use LoRA() "
            "or VPETL() with it, or a 2D backbone on slices (AIMViT, AIMSwin, ViTSegmenter)"
        )
    return planar


def _patch(transformer: ViT | SwinTransformer) -> tuple[int, ...]:
    return patch_of(transformer.patch_embedding if isinstance(transformer, ViT) else transformer.patch_embed)


def _blocks(transformer: ViT | SwinTransformer) -> list[tuple[int, TransformerBlock | SwinTransformerBlock]]:
    """All blocks in order, each with its place in its stage.

    Raises:
        TypeError: one has no attention.
    """
    if isinstance(transformer, ViT):
        stages = [transformer.blocks]
    else:
        layers = (transformer.layers1, transformer.layers2, transformer.layers3, transformer.layers4)
        stages = [layer[0].blocks for layer in layers if len(layer)]
    blocks = [(place, block) for stage in stages for place, block in enumerate(stage)]
    other = next((block for _, block in blocks if not isinstance(block, TransformerBlock | SwinTransformerBlock)), None)
    if other is not None:
        raise TypeError(f"AIM needs attention in all blocks and has no place in {type(other).__name__}; use LoRA()")
    return blocks
