"""Transformers of slices that take whole volumes: the networks that :class:`monai_petl.methods.AIM` adapts.

T. Yang et al., "AIM: Adapting Image Models for Efficient Video Action Recognition", ICLR 2023, arXiv:2302.03024.
"""

from __future__ import annotations

import torch
from einops import rearrange
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from monai_petl.networks.vit.patches import patch_of
from monai_petl.networks.vit.slices import as_slices, as_volume, slices_of

__all__ = ["AIMSwin", "AIMViT"]


class AIMViT(ViT):
    """A 2D ``ViT`` that runs over the slices of volumes. Without AIM attached each slice is seen by itself.

    It takes the modules of ``vit`` over, under the same names: a state dict of ``vit`` loads.

    Args:
        vit: a MONAI ``ViT`` for images of one slice.
        norm_pre: a norm of the tokens after all embeddings, before the first block (CLIP).

    Raises:
        TypeError: ``vit`` is no ``ViT``.
        ValueError: it is 3D.

    Example::

        vit = ViT(1, (96, 96), (16, 16), spatial_dims=2, classification=True, qkv_bias=True)
        network = adapt(AIMViT(vit), AIM(num_slices=8))
        scores, hidden = network(torch.rand(2, 1, 96, 96, 8))  # (16, 2), and of every block (16, 37, 768)
        network.class_tokens(torch.rand(2, 1, 96, 96, 8))  # (2, 768, 8)
    """

    def __init__(self, vit: ViT, norm_pre: nn.Module | None = None) -> None:
        _take_over(self, vit, ViT, "patch_embedding")
        self.embedded = nn.Identity()  # where the embedding of slices is added
        self.norm_pre = nn.Identity() if norm_pre is None else norm_pre

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            image: (B, C, H, W, D), or slices (B * D, C, H, W).

        Returns:
            as ``ViT``: final tokens (B * D, N, C), or the scores (B * D, classes) of its classification head where there is
            one, and the tokens behind every block.
        """
        tokens, hidden = self.tokens(image)
        if hasattr(self, "classification_head"):
            return self.classification_head(tokens[:, 0]), hidden
        return tokens, hidden

    def tokens(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Final tokens (B * D, N, C) after the norm, class token first, and those behind every block before it."""
        slices, count = _slices(image)
        with slices_of(self).given(count):
            x = self.patch_embedding(slices)
            if hasattr(self, "cls_token"):
                x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
            x = self.norm_pre(self.embedded(x))
            hidden = []
            for block in self.blocks:
                x = block(x)
                hidden.append(x)
            return self.norm(x), hidden

    def class_tokens(self, volume: Tensor) -> Tensor:
        """The final class token of every slice (B, C, D), of volumes (B, C, H, W, D).

        Raises:
            ValueError: the transformer has no class token.
        """
        if not hasattr(self, "cls_token"):
            raise ValueError("this transformer has no class token; build the ViT with classification=True")
        tokens, _ = self.tokens(volume)
        return rearrange(tokens[:, 0], "(b d) c -> b c d", d=volume.shape[-1])


class AIMSwin(SwinTransformer):
    """A 2D ``SwinTransformer`` that runs over the slices of volumes, in the manner of :class:`AIMViT`.

    Args:
        swin: a MONAI ``SwinTransformer`` with ``spatial_dims=2``.

    Raises:
        TypeError: ``swin`` is no ``SwinTransformer``.
        ValueError: it is 3D.
    """

    def __init__(self, swin: SwinTransformer) -> None:
        _take_over(self, swin, SwinTransformer, "patch_embed")

    def forward(self, image: Tensor, normalize: bool = True) -> list[Tensor]:
        """The maps of all stages (B, C, H, W, D) of volumes (B, C, H, W, D), or (B * D, C, H, W) of slices."""
        slices, count = _slices(image)
        with slices_of(self).given(count):
            maps = super().forward(slices, normalize)
        return maps if count is None else [as_volume(one, count) for one in maps]


def _slices(image: Tensor) -> tuple[Tensor, int | None]:
    """Slices (B * D, C, H, W), and D where they came as volumes."""
    if image.ndim == 4:
        return image, None
    if image.ndim != 5:
        raise ValueError(f"images must be volumes (B, C, H, W, D) or slices (B * D, C, H, W), got {tuple(image.shape)}")
    return as_slices(image), image.shape[-1]


def _take_over(network: nn.Module, source: nn.Module, kind: type[nn.Module], embedding: str) -> None:
    """Make ``network``, an instance of a subclass of ``kind``, hold what ``source`` holds."""
    if not isinstance(source, kind):
        raise TypeError(f"{type(network).__name__} needs a MONAI {kind.__name__}, got {type(source).__name__}")
    patch = patch_of(getattr(source, embedding))
    if len(patch) != 2:
        raise ValueError(
            f"{type(network).__name__} needs a {kind.__name__} with spatial_dims=2, got one with patches of {patch}; a 3D one "
            "sees depth as it is, use LoRA() or VPETL() with it"
        )
    slices_of(source)  # made now, so that both share it
    nn.Module.__init__(network)
    vars(network).update({name: value for name, value in vars(source).items() if name not in vars(network)})
    network.training = source.training
    for name, parameter in source.named_parameters(recurse=False):
        network.register_parameter(name, parameter)
    for name, module in source.named_children():
        network.add_module(name, module)
