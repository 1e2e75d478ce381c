"""What networks around a MONAI ``ViT`` ask of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from monai.networks.blocks import TransformerBlock
from monai.networks.nets import ViT
from torch import Tensor, nn
from torch.nn import functional as F

from monai_petl.networks.vit.patches import patch_of

__all__ = ["ViTNetwork", "first_tokens", "headless", "resize_positions", "side_block", "token_grid"]


class ViTNetwork(nn.Module):
    """Base of networks around a transformer.

    Attributes:
        HEAD: name of the part that :class:`monai_petl.methods.HeadOnly` trains.
        backbone: the transformer.
        img_size: pixels or voxels that it was built for.
    """

    if TYPE_CHECKING:  # TorchScript would try to compile annotations that a class carries
        HEAD: ClassVar[str]
        backbone: ViT
        img_size: tuple[int, ...]

    def backbone_size(self) -> tuple[int, ...]:
        """Pixels or voxels that the backbone's positions are made for."""
        return self.img_size


def headless(backbone: nn.Module, owner: type[nn.Module]) -> ViT:
    """The transformer without its classification head: nothing outside depends on it, and an adapter should not either.

    Raises:
        TypeError: this is no ``ViT``.
    """
    missing = [name for name in ("patch_embedding", "blocks", "norm") if not hasattr(backbone, name)]
    if missing:
        raise TypeError(
            f"{owner.__name__} needs a MONAI ViT as its backbone, got {type(backbone).__name__}, which has no {missing[0]}"
        )
    if hasattr(backbone, "classification_head"):
        del backbone.classification_head
    return backbone


def side_block(width: int, num_heads: int) -> TransformerBlock:
    """A block of a side network, whose linear layers start at a deviation of 0.02."""
    block = TransformerBlock(width, 4 * width, num_heads, qkv_bias=True, use_flash_attention=True)
    del block.norm_cross_attn  # never used, but it would count as trained
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return block


def token_grid(size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Patches along each axis.

    Raises:
        ValueError: the patches do not divide the size.
    """
    if len(size) != len(patch) or any(extent % side for extent, side in zip(size, patch, strict=True)):
        raise ValueError(
            f"patches of {tuple(patch)} do not divide an image of {tuple(size)}; crop or pad it, or slide a window of a "
            "multiple of the patches"
        )
    return tuple(extent // side for extent, side in zip(size, patch, strict=True))


def first_tokens(
    vit: ViT, image: Tensor, img_size: Sequence[int], resize_offset: float = 0.0
) -> tuple[Tensor, tuple[int, ...]]:
    """What goes into the first block, for images of other sizes than the transformer's too.

    Args:
        vit: the transformer; where it has a layer ``norm_pre`` (CLIP), the tokens pass it.
        image: (B, C, *size).
        img_size: pixels or voxels that the transformer was built for.
        resize_offset: see :func:`resize_positions`.

    Returns:
        Tokens (B, 1 + N, hidden size), or (B, N, hidden size) without a class token; and the grid of the N patches.
    """
    embedding = vit.patch_embedding
    patch = patch_of(embedding)
    grid = token_grid(image.shape[2:], patch)
    trained = token_grid(img_size, patch)
    if grid == trained:
        tokens = embedding(image)
    else:
        patches = embedding.patch_embeddings(image)
        patches = patches.flatten(2).mT if embedding.proj_type == "conv" else patches
        tokens = embedding.dropout(
            patches + resize_positions(embedding.position_embeddings, trained, grid, resize_offset)
        )
    if hasattr(vit, "cls_token"):
        tokens = torch.cat((vit.cls_token.expand(tokens.shape[0], -1, -1), tokens), 1)
    return (vit.norm_pre(tokens) if hasattr(vit, "norm_pre") else tokens), grid


def resize_positions(table: Tensor, trained: Sequence[int], grid: Sequence[int], offset: float = 0.0) -> Tensor:
    """A table of positions (1, N, C) for another grid: bicubic in 2D, trilinear in 3D, without antialiasing.

    Args:
        table: of the trained grid, class token left out.
        trained, grid: places along each axis.
        offset: 0 resizes to the grid's size; with 0.1 the factor is (places + 0.1) / trained places, as in DINO and FPT.
    """
    grid = tuple(int(places) for places in grid)  # which are tensors while a network is traced
    if tuple(trained) == grid:
        return table
    if table.shape[1] != math.prod(trained):
        raise ValueError(f"a table of {table.shape[1]} positions is none of a grid of {tuple(trained)}")
    mode = "bicubic" if len(grid) == 2 else "trilinear"
    places = table.mT.unflatten(2, tuple(trained))
    if not offset:
        return F.interpolate(places, grid, mode=mode).flatten(2).mT
    factors = [(g + offset) / t for g, t in zip(grid, trained, strict=True)]
    return F.interpolate(places, scale_factor=factors, mode=mode).flatten(2).mT
