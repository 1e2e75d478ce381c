"""Volumes as batches of slices, for 2D networks: the slices of a volume lie next to each other, row b * D + d.

What mixes slices inside such a network cannot see from the batch how many belong together; :class:`Slices` tells it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

__all__ = ["Slices", "as_slices", "as_volume", "slices_of"]


@dataclass
class Slices:
    """How many slices a volume has, for all that mixes slices inside one transformer.

    Attributes:
        count: D of the volumes that the transformer is given at present; ``None`` where the network around it does not say.
    """

    count: int | None = None

    @contextmanager
    def given(self, count: int | None) -> Iterator[None]:
        """Within the block a volume has ``count`` slices; ``None`` leaves what was said further out."""
        before = self.count
        self.count = before if count is None else count
        try:
            yield
        finally:
            self.count = before


def slices_of(transformer: nn.Module) -> Slices:
    """The one object of this transformer, made where there is none. The network around it sets the count for a forward.

    Example::

        with slices_of(vit).given(volume.shape[-1]):
            tokens, _ = vit(as_slices(volume))
    """
    return transformer.__dict__.setdefault("_slices", Slices())


def as_slices(volume: Tensor) -> Tensor:
    """(B, C, H, W, D) as (B * D, C, H, W)."""
    return rearrange(volume, "b c h w d -> (b d) c h w")


def as_volume(maps: Tensor, count: int) -> Tensor:
    """(B * D, C, h, w) as (B, C, h, w, D), D = ``count``."""
    return rearrange(maps, "(b d) c h w -> b c h w d", d=count)
