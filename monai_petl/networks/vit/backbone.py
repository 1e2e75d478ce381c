"""The backbone of networks around a ``ViT``."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import ViT
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from monai_petl.networks.vit.attention_bias import add_attention_bias

__all__ = ["set_eps", "vit_backbone"]


def vit_backbone(
    in_channels: int,
    img_size: Sequence[int],
    patch_size: Sequence[int],
    *,
    hidden_size: int = 768,
    mlp_dim: int = 3072,
    num_layers: int = 12,
    num_heads: int = 12,
    norm_eps: float = 1e-6,
    class_token: bool = True,
    attention_bias: str | None = None,
) -> ViT:
    """A MONAI ``ViT`` with random weights into which an inflated checkpoint of this architecture fits.

    Args:
        in_channels, img_size, patch_size, hidden_size, mlp_dim, num_layers, num_heads: as in ``ViT``.
        norm_eps: epsilon of the layer norms, of which ``ViT`` has no argument.
        class_token: whether there is one.
        attention_bias: ``"table"`` for relative positions (BEiT), ``"class_key"`` for several patches along depth beside
            a class token (nothing for a single one), or none.
    """
    vit = ViT(
        in_channels,
        img_size,
        patch_size,
        hidden_size,
        mlp_dim,
        num_layers,
        num_heads,
        classification=class_token,
        spatial_dims=len(img_size),
        qkv_bias=True,
    )
    set_eps(vit, norm_eps)
    grid = [extent // side for extent, side in zip(img_size, patch_size, strict=True)]
    if attention_bias == "table" or (attention_bias and len(grid) == 3 and grid[-1] > 1):
        add_attention_bias(vit, attention_bias, grid, num_heads, depth=grid[-1])
    return vit


def set_eps(network: nn.Module, eps: float) -> int:
    """Set the epsilon of every layer and batch norm, which MONAI's constructors do not take; returns how many changed."""
    norms = [m for m in network.modules() if isinstance(m, nn.LayerNorm | _BatchNorm) and m.eps != eps]
    for norm in norms:
        norm.eps = eps
    return len(norms)
