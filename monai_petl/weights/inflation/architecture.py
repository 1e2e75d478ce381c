"""What the tensors of a 2D checkpoint say about the MONAI network that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

__all__ = ["Architecture", "ResNetArchitecture", "SwinArchitecture", "ViTArchitecture"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What every kind has.

    Attributes:
        in_channels: image channels of the source.
        eps: epsilon of the source's normalisation layers; MONAI's layer norms need it set.
    """

    kind: ClassVar[str]
    in_channels: int
    eps: float


@dataclass(frozen=True, kw_only=True)
class ViTArchitecture(Architecture):
    """For ``monai.networks.nets.ViT``.

    Attributes:
        hidden_size, mlp_dim, num_layers: as in ViT.
        num_heads: read from bias tables, else given, else from the usual width of a head; None when that does not divide.
        patch_size: (h, w) in pixels.
        grid: (h, w) patches of the position table; None when there is no table, or it is not square and no grid was given.
        positions: number of patches in the position table; 0 without one.
        class_token, qkv_bias, final_norm: whether the source has them.
        relative_bias: whether attention adds a relative position bias (BEiT).
    """

    kind: ClassVar[str] = "vit"
    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int | None
    patch_size: tuple[int, int]
    grid: tuple[int, int] | None
    positions: int
    class_token: bool
    qkv_bias: bool
    final_norm: bool
    relative_bias: bool


@dataclass(frozen=True, kw_only=True)
class SwinArchitecture(Architecture):
    """For ``monai.networks.nets.swin_unetr.SwinTransformer``; attributes as there, sizes (h, w)."""

    kind: ClassVar[str] = "swin"
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: tuple[int, int]
    patch_size: tuple[int, int]
    mlp_ratio: float
    qkv_bias: bool
    patch_norm: bool


@dataclass(frozen=True, kw_only=True)
class ResNetArchitecture(Architecture):
    """For ``monai.networks.nets.ResNet``; ``block`` is basic or bottleneck, ``conv1_size`` is (h, w)."""

    kind: ClassVar[str] = "resnet"
    block: str
    layers: tuple[int, ...]
    block_inplanes: tuple[int, ...]
    conv1_size: tuple[int, int]
