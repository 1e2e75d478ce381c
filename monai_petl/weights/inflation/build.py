"""MONAI networks with the weights of a 2D checkpoint, ready to be trained on volumes.

Zhang et al., "Adapting Pre-trained Vision Transformers from 2D to 3D through Weight Inflation Improves Medical Image
Segmentation" (ML4H 2022, arXiv 2302.04303).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from monai.networks.nets import ResNet, ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from monai.utils import ensure_tuple_rep
from torch import nn

from monai_petl.networks.vit.patches import check_patches
from monai_petl.weights.inflation.architecture import (
    Architecture,
    ResNetArchitecture,
    SwinArchitecture,
    ViTArchitecture,
)
from monai_petl.weights.inflation.files import StateSource
from monai_petl.weights.inflation.guarantees import swin_grids, swin_window_depth
from monai_petl.weights.inflation.load import convert_checkpoint, load_pretrained
from monai_petl.weights.inflation.report import Report
from monai_petl.weights.inflation.tensor_rules import Mode

__all__ = ["build_from_pretrained", "resnet_from_pretrained", "swin_from_pretrained", "vit_from_pretrained"]

Size = Sequence[int] | int
SIZES = {  # arguments that a kind of network has and others have not
    "vit": ("img_size", "patch_size"),
    "swin": ("img_size", "patch_size", "window_depth", "downsample"),
    "resnet": ("img_size",),  # which takes any
}
FACTS = ("family", "num_heads", "grid", "eps")


def vit_from_pretrained(
    source: StateSource,
    *,
    spatial_dims: int,
    img_size: Size,
    patch_size: Size | None = None,
    in_channels: int = 3,
    mode: Mode = "center",
    class_key_bias: bool = False,
    network_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> ViT:
    """A ``monai.networks.nets.ViT`` with the weights of a 2D vision transformer (timm, torchvision, Hugging Face).

    Args:
        source: file, folder, name on the Hugging Face hub, or state dict.
        spatial_dims: 2 or 3.
        img_size: spatial size of the images in voxels, (H, W) or (H, W, D); a multiple of the patches.
        patch_size: default: the source's in-plane, and all of the depth, so that there is one depth token as in the paper.
        in_channels: channels of the images; the source's colours are summed and shared among them.
        mode: where the depth kernel looks: ``center`` or ``average``.
        class_key_bias: makes several depth tokens start exactly beside a class token.
        network_options: further arguments of ``ViT``.
        options: ``num_heads``, ``grid``, ``eps``, ``family``, ``image_mean`` and ``image_std`` of the source, and the rules
            ``channel_mode``, ``depth_axis``, ``position_mode``, ``table_mode``, ``resize_patch``; see :func:`load_pretrained`.

    Returns:
        The network. Its second output, the hidden states, are those of the source; a class token, if any, is token 0.

    Raises:
        ValueError: the source is of another kind or damaged, or sizes do not fit.
    """
    network, _ = build_from_pretrained(
        "vit",
        source,
        spatial_dims=spatial_dims,
        img_size=img_size,
        patch_size=patch_size,
        in_channels=in_channels,
        mode=mode,
        class_key_bias=class_key_bias,
        network_options=network_options,
        **options,
    )
    return cast(ViT, network)


def swin_from_pretrained(
    source: StateSource,
    *,
    spatial_dims: int,
    img_size: Size,
    patch_size: Size | None = None,
    in_channels: int = 3,
    mode: Mode = "center",
    window_depth: int | None = None,
    downsample: str = "merging",
    network_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> SwinTransformer:
    """A ``monai.networks.nets.swin_unetr.SwinTransformer`` with the weights of a 2D Swin transformer (timm, Hugging Face).

    Args:
        source, spatial_dims, img_size, in_channels, mode, options: as in :func:`vit_from_pretrained`.
        patch_size: default: the source's, also along depth.
        window_depth: tokens of a window along depth. Default: the most that starts exactly, up to the source's window.
        downsample: ``merging`` or ``mergingv2``; the weights fit the one they are made for only.
        network_options: further arguments of ``SwinTransformer``.
    """
    network, _ = build_from_pretrained(
        "swin",
        source,
        spatial_dims=spatial_dims,
        img_size=img_size,
        patch_size=patch_size,
        in_channels=in_channels,
        mode=mode,
        window_depth=window_depth,
        downsample=downsample,
        network_options=network_options,
        **options,
    )
    return cast(SwinTransformer, network)


def resnet_from_pretrained(
    source: StateSource,
    *,
    spatial_dims: int,
    in_channels: int = 3,
    mode: Mode = "center",
    network_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> ResNet:
    """A ``monai.networks.nets.ResNet`` with the weights of a ResNet of torchvision.

    Args:
        source, spatial_dims, in_channels, mode, options: as in :func:`vit_from_pretrained`.
        network_options: further arguments of ``ResNet``, for instance ``conv1_t_size=(7, 7, 3), conv1_t_stride=(2, 2, 1)``
            for thin volumes, or ``feed_forward=True, num_classes=4`` for a new head.
    """
    network, _ = build_from_pretrained(
        "resnet",
        source,
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        mode=mode,
        network_options=network_options,
        **options,
    )
    return cast(ResNet, network)


def build_from_pretrained(
    kind: str,
    source: StateSource,
    *,
    spatial_dims: int,
    img_size: Size | None = None,
    patch_size: Size | None = None,
    in_channels: int = 3,
    mode: Mode = "center",
    class_key_bias: bool = False,
    window_depth: int | None = None,
    downsample: str | None = None,
    network_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, Report]:
    """The network of ``kind`` (vit, swin or resnet) and the report of its weights; arguments as in the functions above."""
    extra = dict(network_options or {})
    own = {"img_size": img_size, "patch_size": patch_size, "window_depth": window_depth, "downsample": downsample}
    _check_arguments(kind, spatial_dims, in_channels, own)
    facts = {name: options.pop(name, None) for name in FACTS}
    converted = convert_checkpoint(source, **facts)
    architecture, depth_axis = converted.architecture, options.get("depth_axis", 2)
    if architecture.kind != kind:
        raise ValueError(
            f"the checkpoint is a {architecture.kind} ({converted.source}), a {kind} is wanted. Use "
            f"{architecture.kind}_from_pretrained, or another checkpoint"
        )
    sizes = _sizes(architecture, spatial_dims, img_size, patch_size, depth_axis)
    if isinstance(architecture, SwinArchitecture):
        extra["downsample"] = downsample or "merging"
    try:
        network = _network(architecture, in_channels, spatial_dims, sizes, window_depth, depth_axis, extra)
    except TypeError as error:
        raise ValueError(f"network_options {sorted(extra)} do not go with the rest: {error}") from error
    size = sizes[0] or None
    report = load_pretrained(network, converted, mode, img_size=size, class_key_bias=class_key_bias, **options)
    if isinstance(network, SwinTransformer) and spatial_dims == 3 and tuple(network.window_size)[depth_axis] == 1:
        report.notes.append(
            "windows are one token deep: attention stays in its plane, and only patch merging joins depths. A larger depth of "
            "the image gives deeper windows"
        )
    return network, report


def _network(
    architecture: Architecture,
    in_channels: int,
    spatial_dims: int,
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    window_depth: int | None,
    depth_axis: int,
    extra: Mapping[str, Any],
) -> nn.Module:
    """MONAI's network of this architecture, with random weights."""
    if isinstance(architecture, ViTArchitecture):
        return _vit(architecture, in_channels, *sizes, extra)
    if isinstance(architecture, SwinArchitecture):
        return _swin(architecture, in_channels, *sizes, window_depth, depth_axis, extra)
    return _resnet(cast(ResNetArchitecture, architecture), in_channels, spatial_dims, extra)


def _check_arguments(kind: str, spatial_dims: int, in_channels: int, own: Mapping[str, Any]) -> None:
    """Refuse what no network has, and what this kind of network has not (``own``)."""
    if kind not in SIZES:
        raise ValueError(f"network must be vit, swin or resnet, got {kind!r}")
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
    if not isinstance(in_channels, int) or in_channels < 1:
        raise ValueError(f"in_channels must be a whole number of at least 1, got {in_channels!r}")
    for name, value in own.items():
        if value is not None and name not in SIZES[kind]:
            raise ValueError(f"a {kind} has no {name}; got {value!r}")


def _sizes(
    architecture: Architecture, spatial_dims: int, img_size: Size | None, patch_size: Size | None, depth_axis: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Image and patch size along each axis; a ResNet has neither."""
    if not isinstance(architecture, ViTArchitecture | SwinArchitecture):
        return (), ()
    if img_size is None:
        raise ValueError(
            f"img_size is needed for a {architecture.kind}: the size of the images in voxels, (H, W) or (H, W, D)"
        )
    for name, value in (("img_size", img_size), ("patch_size", patch_size)):
        values = (value,) if isinstance(value, int) or value is None else value
        if value is not None and (isinstance(value, str) or not all(isinstance(v, int) and v > 0 for v in values)):
            raise ValueError(f"{name} must be whole numbers of voxels such as 224,224,5; got {value!r}")
        if value is not None and not isinstance(value, int) and len(value) != spatial_dims:
            raise ValueError(
                f"{name} must have {spatial_dims} values for spatial_dims={spatial_dims}, got {tuple(value)}"
            )
    image = tuple(ensure_tuple_rep(img_size, spatial_dims))
    if patch_size is not None:
        return image, tuple(ensure_tuple_rep(patch_size, spatial_dims))
    patch = list(architecture.patch_size)
    if spatial_dims == 3:
        deep = image[depth_axis] if isinstance(architecture, ViTArchitecture) else patch[0]
        patch.insert(depth_axis, deep)
    return image, tuple(patch)


def _vit(
    source: ViTArchitecture, in_channels: int, image: tuple[int, ...], patch: tuple[int, ...], extra: Mapping[str, Any]
) -> ViT:
    if source.num_heads is None:
        raise ValueError(
            f"the number of heads cannot be told from a hidden size of {source.hidden_size}. Give the source's as num_heads="
        )
    check_patches(image, patch)
    network = ViT(
        in_channels=in_channels,
        img_size=image,
        patch_size=patch,
        hidden_size=source.hidden_size,
        mlp_dim=source.mlp_dim,
        num_layers=source.num_layers,
        num_heads=source.num_heads,
        pos_embed_type="learnable" if source.positions else "none",
        spatial_dims=len(image),
        **{"classification": source.class_token, "qkv_bias": source.qkv_bias, **extra},
    )
    if not source.positions:  # MONAI keeps a table of zeros, which would train
        network.patch_embedding.position_embeddings.requires_grad_(False)
    return network


def _swin(
    source: SwinArchitecture,
    in_channels: int,
    image: tuple[int, ...],
    patch: tuple[int, ...],
    window_depth: int | None,
    depth_axis: int,
    extra: Mapping[str, Any],
) -> SwinTransformer:
    window = list(source.window_size)
    if window_depth is not None and (len(image) == 2 or window_depth < 1):
        raise ValueError(f"window_depth is for 3D and at least 1, got {window_depth}")
    if len(image) == 3:
        depths = [grid[depth_axis] for grid in swin_grids(image, patch)]
        window.insert(depth_axis, window_depth or swin_window_depth(depths, window[0], may_clip=depth_axis == 0))
    return SwinTransformer(
        in_chans=in_channels,
        embed_dim=source.embed_dim,
        window_size=tuple(window),
        patch_size=patch,
        depths=source.depths,
        num_heads=source.num_heads,
        mlp_ratio=source.mlp_ratio,
        spatial_dims=len(image),
        **{"qkv_bias": source.qkv_bias, "patch_norm": source.patch_norm, **extra},
    )


def _resnet(source: ResNetArchitecture, in_channels: int, spatial_dims: int, extra: Mapping[str, Any]) -> ResNet:
    options = {
        "conv1_t_size": (*source.conv1_size, source.conv1_size[0])[:spatial_dims],
        "conv1_t_stride": 2,
        "feed_forward": False,
        "bias_downsample": False,
    }
    return ResNet(
        block=source.block,
        layers=list(source.layers),
        block_inplanes=list(source.block_inplanes),
        spatial_dims=spatial_dims,
        n_input_channels=in_channels,
        **{**options, **extra},
    )
