"""Grey, coloured and transparent images as what a network takes."""

from __future__ import annotations

import pytest
import torch

from monai_petl.transforms import ToChannelsd

IMAGE = torch.arange(4 * 2 * 3, dtype=torch.float32).view(4, 2, 3)


@pytest.mark.parametrize(("count", "kept"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])])
def test_three_channels(count, kept):
    changed = ToChannelsd("image")({"image": IMAGE[:count], "label": 1})
    assert torch.equal(changed["image"], IMAGE[kept])
    assert changed["label"] == 1


def test_one_channel():
    transform = ToChannelsd("image", channels=1)
    assert torch.equal(transform({"image": IMAGE[:1]})["image"], IMAGE[:1])
    assert torch.equal(transform({"image": IMAGE})["image"], IMAGE[:3].mean(0, keepdim=True))


def test_what_is_no_picture_is_refused():
    with pytest.raises(ValueError, match="5 channels is neither grey nor coloured"):
        ToChannelsd("image")({"image": torch.zeros(5, 2, 2)})
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        ToChannelsd("image", channels=2)
