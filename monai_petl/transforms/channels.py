"""Grey and colour images as what a network takes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

__all__ = ["ToChannelsd"]


class ToChannelsd(MapTransform):
    """Bring an image (C, *spatial) to a number of channels: grey is repeated, transparency is left out, colours become grey.

    Args:
        keys: of the images.
        channels: 1 or 3.

    Raises:
        ValueError: ``channels`` is neither; an image has more than four.
    """

    def __init__(self, keys: KeysCollection, channels: int = 3, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        changed = dict(data)
        for key in self.key_iterator(changed):
            image = changed[key]
            count = image.shape[0]
            if count > 4:
                raise ValueError(
                    f"an image of {count} channels is neither grey nor coloured; its shape is {tuple(image.shape)}"
                )
            image = image[: 1 if count < 3 else 3]  # without transparency
            if image.shape[0] > self.channels:
                image = image.float().mean(0, keepdim=True)
            changed[key] = (
                image.expand(self.channels, *image.shape[1:]).clone() if image.shape[0] < self.channels else image
            )
        return changed
