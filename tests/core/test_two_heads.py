"""Two adapters that each bring a head are used one at a time; all others go together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.networks.nets import SwinUNETR
from torch import nn

import monai_petl as mp
from monai_petl.methods import HeadOnly, LoRA

IMAGE = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(3))
SENTENCE = (
    r"adapters 'kidney' and 'aorta' each bring a head of their own in place of out\.conv\.conv.*activate\(network\)"
)


def network() -> SwinUNETR:
    torch.manual_seed(0)
    sizes = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "spatial_dims": 2}
    return SwinUNETR(in_channels=1, out_channels=4, **sizes).eval()


def organ(name: str, folder: Path) -> Path:
    adapted = mp.adapt(network(), [LoRA(rank=2), HeadOnly(num_classes=2)], name=name)
    torch.manual_seed(len(name))
    for parameter in mp.trainable_parameters(adapted):
        nn.init.normal_(parameter, 0, 0.1)
    return mp.save_adapter(adapted, folder / f"{name}.safetensors")


@torch.no_grad()
def test_a_second_head_is_refused_and_one_at_a_time_is_exact(tmp_path):
    files = {name: organ(name, tmp_path) for name in ("kidney", "aorta")}
    alone = {name: mp.load_adapter(network(), file)(IMAGE) for name, file in files.items()}
    both = mp.load_adapter(network(), files["kidney"])
    before = list(both.state_dict())
    with pytest.raises(ValueError, match=SENTENCE):
        mp.load_adapter(both, files["aorta"])
    assert list(both.state_dict()) == before
    assert torch.equal(both(IMAGE), alone["kidney"])
    mp.activate(both)
    mp.load_adapter(both, files["aorta"])
    assert torch.equal(both(IMAGE), alone["aorta"])
    with pytest.raises(ValueError, match=SENTENCE):
        mp.activate(both, "kidney", "aorta")
    assert torch.equal(both(IMAGE), alone["aorta"])
    for name, expected in alone.items():
        assert torch.equal(mp.activate(both, name)(IMAGE), expected)


def test_attaching_a_second_head_is_refused():
    adapted = mp.adapt(network(), HeadOnly(num_classes=2), name="kidney")
    with pytest.raises(ValueError, match=SENTENCE):
        mp.adapt(adapted, HeadOnly(num_classes=3), name="aorta")


def test_an_adapter_without_a_head_goes_with_one_that_has_it():
    adapted = mp.adapt(network(), LoRA(rank=2), name="scanner")
    mp.adapt(adapted, HeadOnly(num_classes=2), name="kidney")
    assert mp.activate(adapted, "scanner", "kidney")(IMAGE).shape[1] == 2
