"""Where the attention windows of PUNet lie: partition, padding, shift, and what may see what.

A plan is made once for every volume size and holds no parameters. Window attention goes back to Z. Liu et al., "Swin
Transformer", arXiv:2103.14030 (contiguous windows, ``"block"``); windows that are strided grids are the grid attention of
Z. Tu et al., "MaxViT", arXiv:2204.01697 (``"grid"``), which is also what the published PUNet computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PARTITIONS", "WindowPlan", "effective_window"]

PARTITIONS = ("grid", "block")
FORBIDDEN = 1024.0  # subtracted from a score that must not count; a power of two is exact in half precision too


def effective_window(size: Sequence[int], window_size: Sequence[int]) -> tuple[list[int], list[int]]:
    """Window and shift an axis: an axis that fits into one window gets a window of its extent and no shift."""
    window = [min(w, extent) for w, extent in zip(window_size, size, strict=True)]
    shift = [0 if extent <= w else w // 2 for w, extent in zip(window_size, size, strict=True)]
    return window, shift


class WindowPlan:
    """Partition of one volume size into windows, for one attention sub-block.

    Scores that must not count (between voxels that a cyclic shift made neighbours, or onto padding) are excluded by a few
    extra channels of queries and keys, the *marks*: their product is 0 where a key may be seen and at most
    ``-FORBIDDEN`` where it may not. No mask of the size of the score matrix exists, so one small relative-position bias
    serves all windows, and fused attention stays applicable in training.

    Args:
        size: extents (H, W, D) in voxels.
        window_size: configured window, in voxels.
        partition: ``"grid"`` (window = voxels of one residue class, index = position * windows + window) or ``"block"``
            (window = contiguous box).
        shifted: whether this is the shifted sub-block. Shifting does not change which voxels share a strided grid, so
            with ``"grid"`` nothing is shifted.
    """

    def __init__(
        self, size: Sequence[int], window_size: Sequence[int], partition: str, shifted: bool, device: torch.device
    ) -> None:
        self.size = tuple(size)
        self.partition = partition
        self.window, shift = effective_window(size, window_size)
        self.shift = shift if shifted and partition == "block" else [0, 0, 0]
        self.counts = [-(-extent // w) for extent, w in zip(size, self.window, strict=True)]
        if partition == "grid":  # a last position that would be padding in every window is left out
            self.window = [-(-extent // n) for extent, n in zip(size, self.counts, strict=True)]
        self.padded = [n * w for n, w in zip(self.counts, self.window, strict=True)]
        self.num_windows = self.counts[0] * self.counts[1] * self.counts[2]
        self.window_voxels = self.window[0] * self.window[1] * self.window[2]
        self.query_marks, self.key_marks = self._marks(device)
        self.is_open = self.padded == list(size) and not any(self.shift)

    def to_windows(self, x: Tensor) -> Tensor:
        """(B, H, W, D, C) -> windows (B, P, N, C)."""
        return self.split(self.lay_out(x)).reshape(x.shape[0], self.num_windows, self.window_voxels, -1)

    def lay_out(self, x: Tensor) -> Tensor:
        """(B, H, W, D, C) -> padded at the end of each axis and rolled by the shift."""
        amount = [p - s for p, s in zip(self.padded, self.size, strict=True)]
        if any(amount):
            x = F.pad(x, (0, 0, 0, amount[2], 0, amount[1], 0, amount[0]))
        return self._roll(x, -1)

    def split(self, x: Tensor) -> Tensor:
        """Laid-out (B, H, W, D, ...) -> view (B, Ph, Pw, Pd, wh, ww, wd, ...): windows first, positions after."""
        (p0, p1, p2), (w0, w1, w2) = self.counts, self.window
        if self.partition == "grid":
            split = x.reshape(x.shape[0], w0, p0, w1, p1, w2, p2, *x.shape[4:])
            return split.movedim((2, 4, 6), (1, 2, 3))
        split = x.reshape(x.shape[0], p0, w0, p1, w1, p2, w2, *x.shape[4:])
        return split.movedim((1, 3, 5), (1, 2, 3))

    def merge(self, x: Tensor) -> Tensor:
        """Windows (B, P, N, C) or (B, Ph, Pw, Pd, wh, ww, wd, C) -> (B, H, W, D, C): back to an image, without padding."""
        x = x.reshape(x.shape[0], *self.counts, *self.window, x.shape[-1])
        order = (0, 4, 1, 5, 2, 6, 3, 7) if self.partition == "grid" else (0, 1, 4, 2, 5, 3, 6, 7)
        merged = x.permute(order).reshape(x.shape[0], *self.padded, x.shape[-1])
        merged = self._roll(merged, 1)
        return merged[:, : self.size[0], : self.size[1], : self.size[2]]

    def _roll(self, x: Tensor, sign: int) -> Tensor:
        axes = [axis for axis in range(3) if self.shift[axis]]
        if not axes:
            return x
        return x.roll([sign * self.shift[axis] for axis in axes], [axis + 1 for axis in axes])

    def _marks(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Query and key marks (1, P, N, 1, E).

        With r = 1 on voxels that the shift carried around the end of an axis, the sum of the two products
        ``r_q * (2 r_k - 1) * M`` and ``1 * (-r_k) * M`` is 0 where ``r_q == r_k`` and -M where not.
        """
        shape = (*self.padded, 1)
        real = self.lay_out(torch.ones(1, *self.size, 1, device=device))[0]
        constant = -FORBIDDEN * (1 - real)
        queries, keys = [], []
        for axis in range(3):
            if self.shift[axis] == 0:
                continue
            index = torch.arange(self.padded[axis], device=device)
            wrapped = (index >= self.padded[axis] - self.shift[axis]).float()
            wrapped = wrapped.view([-1 if a == axis else 1 for a in range(3)] + [1]).expand(shape)
            queries.append(wrapped)
            keys.append((2 * wrapped - 1) * FORBIDDEN)
            constant = constant - FORBIDDEN * wrapped
        query_marks = torch.cat([torch.ones(shape, device=device), *queries], -1)
        key_marks = torch.cat([constant, *keys], -1)
        shape = (1, self.num_windows, self.window_voxels, 1, -1)
        return self.split(query_marks[None]).reshape(shape), self.split(key_marks[None]).reshape(shape)
