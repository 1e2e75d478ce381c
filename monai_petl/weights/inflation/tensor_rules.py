"""2D tensors as 3D tensors, one rule a kind of tensor.

Zhang et al., "Adapting Pre-trained Vision Transformers from 2D to 3D through Weight Inflation Improves Medical Image
Segmentation" (ML4H 2022, arXiv 2302.04303); for convolutions Carreira and Zisserman, "Quo Vadis, Action Recognition?"
(CVPR 2017, arXiv 1705.07750). Every rule keeps the output on a volume that does not change along depth.

``depth_axis`` is the spatial axis of depth in the target: 2 for volumes (B, C, H, W, D), the default, 0 for (B, C, D, H, W).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

__all__ = [
    "MERGING_ORDERS",
    "ChannelMode",
    "Merging",
    "Mode",
    "TableMode",
    "adapt_in_channels",
    "fold_normalization",
    "inflate_kernel",
    "inflate_merging_norm",
    "inflate_merging_reduction",
    "inflate_rel_bias",
    "inflate_transposed_kernel",
    "resize_kernel",
    "resize_pos_embed",
    "resize_rel_bias",
]

Mode = Literal["center", "average"]
ChannelMode = Literal["share", "keep"]
TableMode = Literal["spline", "bicubic"]
Merging = Literal["merging", "mergingv2"]

MERGING_ORDERS: dict[str, tuple[tuple[int, ...], ...]] = {
    "2d": ((0, 0), (1, 0), (0, 1), (1, 1)),
    "merging": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "mergingv2": tuple(itertools.product((0, 1), repeat=3)),
}
"""Offsets (along each spatial axis) of the blocks of C channels that MONAI's patch merging concatenates, in order."""


def adapt_in_channels(weight: Tensor, in_channels: int, mode: ChannelMode = "share") -> Tensor:
    """A kernel (out, in, ...) for another number of image channels (out, in_channels, ...).

    Args:
        weight: kernel of the source, usually of three colours.
        in_channels: channels of the target's images.
        mode: ``share``: the sum over colours, an equal share of it to each channel; exact when all channels are equal, and for
            one channel the source's answer to the grey image. ``keep``: as it is, for images with the source's channels.

    Raises:
        ValueError: ``keep`` with another number of channels, or an unknown mode.
    """
    if mode not in ("share", "keep"):
        raise ValueError(f"channel_mode must be share or keep, got {mode!r}")
    if mode == "keep":
        if in_channels != weight.shape[1]:
            raise ValueError(
                f"channel_mode keep needs the source's {weight.shape[1]} channels, the network has {in_channels}. Use share"
            )
        return weight
    summed = weight.sum(1, keepdim=True) / in_channels
    return summed.expand(-1, in_channels, *summed.shape[2:]).clone()


def fold_normalization(
    weight: Tensor, bias: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Kernel (out, in, h, w) and bias that take ``image`` where the given ones take ``(image - mean) / std``.

    Exact for patch embeddings, which do not pad.
    """
    scale = 1 / torch.as_tensor(std, dtype=weight.dtype)
    offset = torch.as_tensor(mean, dtype=weight.dtype) * scale
    per_channel = weight.sum((2, 3))  # (out, in)
    return weight * scale.view(1, -1, 1, 1), bias - per_channel @ offset


def inflate_kernel(weight: Tensor, depth: int, mode: Mode = "center", depth_axis: int = 2) -> Tensor:
    """A kernel (out, in, h, w) with a depth axis; its sum over depth is the 2D kernel.

    Args:
        weight: the 2D kernel.
        depth: size along depth.
        mode: ``center``: the kernel at index ``depth // 2`` and zero elsewhere. ``average``: an equal share at every index.
        depth_axis: where depth goes among the spatial axes.

    Raises:
        ValueError: an unknown mode, or a depth below 1.
    """
    _check_mode(mode)
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    weight = weight.unsqueeze(2 + depth_axis)
    if mode == "average":
        return weight.repeat_interleave(depth, dim=2 + depth_axis) / depth
    planes = [weight if z == depth // 2 else torch.zeros_like(weight) for z in range(depth)]
    return torch.cat(planes, dim=2 + depth_axis)


def inflate_transposed_kernel(weight: Tensor, depth: int, depth_axis: int = 2) -> Tensor:
    """A transposed kernel (in, out, h, w) whose stride along depth is its size: each plane of the output reads one tap."""
    return weight.unsqueeze(2 + depth_axis).repeat_interleave(depth, dim=2 + depth_axis)


def resize_kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """A patch kernel (out, in, h, w) for patches of another size, by the pseudo-inverse of bilinear resizing.

    The inner product with a patch that was resized bilinearly is that of the given kernel with the patch itself: exactly so for
    larger patches, in the least squares sense for smaller ones (Beyer et al., FlexiViT, CVPR 2023). It is not exact for images,
    whose larger patches hold more than resized smaller ones.
    """
    old, new = weight.shape[2:], tuple(size)
    basis = torch.eye(math.prod(old)).view(-1, 1, *old)
    resized = F.interpolate(basis, new, mode="bilinear", antialias=math.prod(new) < math.prod(old))
    inverse = torch.linalg.pinv(resized.flatten(1).double())  # (new pixels, old pixels)
    flat = weight.flatten(2).double() @ inverse.T  # (out, in, new pixels)
    return flat.view(*weight.shape[:2], *new).to(weight.dtype)


def resize_pos_embed(
    positions: Tensor,
    grid_in: Sequence[int],
    grid_out: Sequence[int],
    depth: int | None = None,
    depth_axis: int = 2,
    mode: str = "bicubic",
) -> Tensor:
    """A position table (1, h*w, C), class entry split off, for another grid, and repeated along depth.

    Args:
        positions: patches row by row.
        grid_in: (h, w) of the table.
        grid_out: (h, w) of the target, in-plane.
        depth: depth tokens of the target; None for a 2D target.
        depth_axis: order of the tokens; with depth last all depths of a place follow each other.
        mode: as in ``torch.nn.functional.interpolate``, without aligned corners.

    Returns:
        (1, tokens, C).

    Raises:
        ValueError: the table is not of that grid.
    """
    if positions.shape[1] != math.prod(grid_in):
        raise ValueError(
            f"the position table has {positions.shape[1]} entries, which is no grid of {tuple(grid_in)}. Give its own grid"
        )
    table = rearrange(positions, "1 (h w) c -> 1 c h w", h=grid_in[0])
    if tuple(grid_in) != tuple(grid_out):
        aligned = {} if mode in ("nearest", "nearest-exact", "area") else {"align_corners": False}
        table = F.interpolate(table, tuple(grid_out), mode=mode, **aligned)  # type: ignore[arg-type]
    if depth is not None:
        table = table.unsqueeze(2 + depth_axis).repeat_interleave(depth, dim=2 + depth_axis)
    return table.flatten(2).mT.contiguous()


def inflate_rel_bias(table: Tensor, window: Sequence[int], depth: int, depth_axis: int = 2) -> Tensor:
    """A table of relative position biases for windows that are ``depth`` tokens deep.

    Every depth offset gets the bias of its in-plane offset, undivided: biases are logits.

    Args:
        table: ((2h-1)(2w-1), heads), or with three more rows for the class token, which stay as they are.
        window: (h, w) of the 2D window.
        depth: tokens of the 3D window along depth.
        depth_axis: where depth goes among the offsets of the flattened table.
    """
    grid, class_rows = _split_table(table, window)
    deep = grid.unsqueeze(depth_axis).repeat_interleave(2 * depth - 1, dim=depth_axis)
    return torch.cat([deep.flatten(0, 2), class_rows])


def resize_rel_bias(
    table: Tensor, window_in: Sequence[int], window_out: Sequence[int], mode: TableMode = "spline"
) -> Tensor:
    """A 2D table of relative position biases, ((2h-1)(2w-1) [+ 3], heads), for another window.

    ``spline`` puts the given offsets at distances that grow geometrically up to the new window's border, so that near offsets
    stay near, and reads an interpolating cubic spline at the integers (BEiT, arXiv 2106.08254). ``bicubic`` stretches evenly.
    """
    if tuple(window_in) == tuple(window_out):
        return table
    grid, class_rows = _split_table(table, window_in)
    size = tuple(2 * w - 1 for w in window_out)
    if mode == "bicubic":
        image = rearrange(grid, "h w heads -> 1 heads h w")
        resized = rearrange(F.interpolate(image, size, mode="bicubic"), "1 heads h w -> (h w) heads")
    elif mode == "spline":
        resized = _spline(grid, size)
    else:
        raise ValueError(f"table_mode must be spline or bicubic, got {mode!r}")
    return torch.cat([resized, class_rows])


def inflate_merging_norm(tensor: Tensor, merging: Merging, depth_axis: int = 2) -> Tensor:
    """Scale or shift (4C) of a 2D patch merging's norm for a 3D one (8C): both depths get the block of their place."""
    blocks = rearrange(tensor, "(blocks c) -> blocks c", blocks=4)
    return torch.cat([blocks[_source_block(offset, depth_axis)] for offset in _merging_order(merging)])


def inflate_merging_reduction(weight: Tensor, merging: Merging, mode: Mode = "center", depth_axis: int = 2) -> Tensor:
    """The linear layer (2C, 4C) of a 2D patch merging for a 3D one (2C, 8C).

    Args:
        weight: of the 2D network.
        merging: order of the blocks: MONAI's ``downsample`` option. A weight made for one order is silently wrong in the other.
        mode: ``center``: all to the first depth. ``average``: half to each.
        depth_axis: spatial axis of depth.
    """
    _check_mode(mode)
    blocks = rearrange(weight, "out (blocks c) -> blocks out c", blocks=4)
    share = (0.5, 0.5) if mode == "average" else (1.0, 0.0)
    parts = [
        blocks[_source_block(offset, depth_axis)] * share[offset[depth_axis]] for offset in _merging_order(merging)
    ]
    return torch.cat(parts, dim=1)


def _check_mode(mode: str) -> None:
    if mode not in ("center", "average"):
        raise ValueError(f"mode must be center or average, got {mode!r}")


def _merging_order(merging: str) -> tuple[tuple[int, ...], ...]:
    if merging not in ("merging", "mergingv2"):
        raise ValueError(f"merging must be merging or mergingv2, got {merging!r}")
    return MERGING_ORDERS[merging]


def _source_block(offset: tuple[int, ...], depth_axis: int) -> int:
    """Index of the 2D block at the in-plane part of a 3D offset."""
    return MERGING_ORDERS["2d"].index(offset[:depth_axis] + offset[depth_axis + 1 :])


def _split_table(table: Tensor, window: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Offsets as (2h-1, 2w-1, heads), and the rows of the class token, if there are any."""
    h, w = (2 * side - 1 for side in window)
    if table.shape[0] - h * w not in (0, 3):
        raise ValueError(
            f"the relative position table has {table.shape[0]} rows, expected {h * w} (or 3 more with a class token) for a "
            f"window of {tuple(window)}. Give the window that the table was made for"
        )
    return rearrange(table[: h * w], "(h w) heads -> h w heads", h=h), table[h * w :]


def _spline(grid: Tensor, size: Sequence[int]) -> Tensor:
    from scipy.interpolate import RectBivariateSpline  # slow to import

    for axis, n in enumerate(size):
        if grid.shape[axis] == 1:  # one offset, no spline: the same everywhere
            grid = grid.repeat_interleave(max(n, 3), dim=axis)
    sources = [_geometric_offsets(old, new) for old, new in zip(grid.shape[:2], size, strict=True)]
    targets = [np.arange(n) - n // 2 for n in size]
    degrees = [min(3, len(s) - 1) for s in sources]  # a cubic needs four points
    heads = [
        RectBivariateSpline(*sources, head.double().numpy(), kx=degrees[0], ky=degrees[1], s=0)(*targets)
        for head in grid.unbind(-1)
    ]
    return torch.from_numpy(np.stack(heads, -1)).to(grid.dtype).flatten(0, 1)


def _geometric_offsets(old: int, new: int) -> np.ndarray:
    """Places of ``old`` offsets 0, ±1, ±(1+q), ±(1+q+q²), ... such that the outermost lies at ``new // 2``.

    A smaller table keeps the offsets that it has room for (q = 1).
    """
    half, border = old // 2, new // 2
    low, high = 1.0, float(max(border, 1))
    while border > half > 1 and high - low > 1e-9:
        q = (low + high) / 2
        low, high = (q, high) if sum(q**i for i in range(half)) < border else (low, q)
    first = border if half == 1 and border > 1 else 1  # a single offset can only be put at the border
    steps = first * np.cumsum([low**i for i in range(half)])
    return np.concatenate([-steps[::-1], [0.0], steps])
