"""A tensor whose name counts up to millions of blocks is refused at once."""

from __future__ import annotations

import time

import pytest
import torch

from monai_petl.inflation import convert_state_dict
from tests.weights.inflation.sources import resnet, timm_swin, timm_vit

CHECKPOINTS = {
    "vit": (timm_vit, "blocks.{}.norm1.weight"),
    "swin": (timm_swin, "layers.2.blocks.{}.norm1.weight"),
    "resnet": (resnet, "layer3.{}.bn1.weight"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("number", ["9999999", "9" * 30, "2000"])
def test_a_number_beyond_all_blocks_is_refused_at_once(kind: str, number: str) -> None:
    make, name = CHECKPOINTS[kind]
    state = make() | {name.format(number): torch.ones(8)}
    begun = time.process_time()
    with pytest.raises(
        ValueError, match=rf"has tensors of .*\.{number}, and \d+ tensors in all.*Get the complete file"
    ):
        convert_state_dict(state)
    assert time.process_time() - begun < 2
