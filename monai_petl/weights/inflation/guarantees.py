"""When an inflated network computes, on a volume that does not change along depth, what the 2D network computes on a slice.

Each function returns a sentence for every condition that a configuration breaks: none broken, and the start is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from monai.networks.nets import ResNet, ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from monai_petl.networks.vit.patches import patch_of
from monai_petl.weights.inflation.options import Options

__all__ = ["broken_guarantees", "swin_grids", "swin_window_depth"]


def broken_guarantees(
    network: nn.Module, options: Options, source: str = "", class_key_bias: bool = False
) -> list[str]:
    """Conditions that the network breaks for images of ``options.img_size``, as sentences with a remedy.

    Args:
        network: ViT, SwinTransformer or ResNet.
        options: mode, depth axis and image size.
        source: family of the source, some of which treat borders in their own way.
        class_key_bias: whether the class token's logits make up for several depth tokens.
    """
    if isinstance(network, SwinTransformer):
        return _swin(network, options.img_size, options, source) if options.img_size else []
    if isinstance(network, ViT):
        return [] if class_key_bias or not options.img_size else _vit(network, options.img_size, options)
    return _convolutions(network, options) if isinstance(network, ResNet) else []


def swin_grids(img_size: Sequence[int], patch_size: Sequence[int], stages: int = 4) -> list[tuple[int, ...]]:
    """Tokens along each axis in every stage, padding included."""
    grids = [tuple(math.ceil(s / p) for s, p in zip(img_size, patch_size, strict=True))]
    for _ in range(stages - 1):
        grids.append(tuple(math.ceil(g / 2) for g in grids[-1]))
    return grids


def swin_window_depth(depths: Sequence[int], largest: int, may_clip: bool = False) -> int:
    """The deepest window, up to ``largest``, that needs no padding in any stage of so many depth tokens.

    ``may_clip``: depth is the first axis, the only one along which MONAI cuts windows without mixing up their biases.
    """
    return max(w for w in range(1, largest + 1) if all(d % w == 0 or (may_clip and d <= w) for d in depths))


def _vit(network: ViT, img_size: Sequence[int], options: Options) -> list[str]:
    patch = patch_of(network.patch_embedding)
    depth = options.depth([s // p for s, p in zip(img_size, patch, strict=True)]) or 1
    if depth == 1 or not hasattr(network, "cls_token"):
        return []
    return [
        f"{depth} depth tokens share one class token, which loses weight in attention: use one depth token (patch depth "
        f"{options.depth(img_size)}), class_key_bias=True, or no class token"
    ]


def _swin(network: SwinTransformer, img_size: Sequence[int], options: Options, source: str) -> list[str]:
    window, deep = tuple(network.window_size), len(img_size) == 3
    grids, broken = swin_grids(img_size, network.patch_size), []
    if any(s % p for s, p in zip(img_size, network.patch_size, strict=True)):
        broken.append(
            f"image size {tuple(img_size)} is padded to patches of {tuple(network.patch_size)}: use multiples"
        )
    for stage, grid in enumerate(grids):
        for axis, (tokens, side) in enumerate(zip(grid, window, strict=True)):
            where = f"stage {stage} has {tokens} tokens along axis {axis} and a window of {side}"
            along_depth = deep and axis == options.depth_axis
            if tokens < side and axis > 0:
                broken.append(f"{where}, which MONAI clips to the wrong biases: use a window of at most {tokens} there")
            if tokens > side and tokens % side and (along_depth or source == "timm_swin"):
                broken.append(f"{where}, which pads with zeros: use a window that divides the tokens")
            if along_depth and tokens % 2 and stage < len(grids) - 1:
                broken.append(
                    f"stage {stage} merges {tokens} depth tokens in pairs, which pads with zeros: use a depth that is a "
                    f"multiple of {network.patch_size[axis] * 2 ** (len(grids) - 1)}"
                )
        sides = options.in_plane(grid)
        if source == "hf_swin" and min(sides) <= min(options.in_plane(window)) < max(sides):
            broken.append(
                f"stage {stage} has {sides[0]}x{sides[1]} tokens: transformers shifts no window there, MONAI shifts along the "
                "longer side; use square images"
            )
    return broken


def _convolutions(network: nn.Module, options: Options) -> list[str]:
    convs = [m for m in network.modules() if isinstance(m, _ConvNd) and not isinstance(m, _ConvTransposeNd)]
    deep = [m for m in convs if len(m.kernel_size) == 3 and m.padding[options.depth_axis]]
    broken = []
    if deep and options.mode == "average":
        broken.append(
            "average inflation reads the zero padding along depth, so planes near both ends differ from the 2D network: use "
            "mode center"
        )
    if any(m.kernel_size[options.depth_axis] % 2 == 0 for m in deep):
        broken.append("a padded kernel of even depth looks beyond the last plane: use an odd depth")
    return broken
