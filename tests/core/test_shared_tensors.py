"""Modules that a network holds twice, and weights that two layers share."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from monai_petl import (
    adapt,
    backbone_state_dict,
    load_adapter,
    merge,
    remove_adapter,
    save_adapter,
    summary,
    trainable_parameters,
)
from monai_petl.methods import FullFineTuning, HeadOnly, LoRA, NormOnly
from tests.conftest import state_of

IMAGE = torch.randn(1, 1, 16, 16)


def dynunet() -> DynUNet:
    torch.manual_seed(0)
    return DynUNet(2, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(4, 8, 8)).eval()


class Tied(nn.Module):
    """Two layers with one weight, and a third of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.own = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.second(self.first(x).relu()).relu())


def trained(network: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in trainable_parameters(network):
        nn.init.normal_(parameter, 0, 0.1)
    return network


@pytest.mark.parametrize(
    "method", [LoRA(rank=2, targets=("conv",)), HeadOnly(), HeadOnly(3), NormOnly(), FullFineTuning()]
)
def test_modules_that_are_held_twice_are_adapted_saved_and_loaded_once(method, tmp_path):
    network = trained(adapt(dynunet(), method))
    file = save_adapter(network, tmp_path / "a.safetensors")
    fresh = load_adapter(dynunet(), file)
    with torch.no_grad():
        assert torch.allclose(fresh(IMAGE), network(IMAGE), atol=1e-5, rtol=1e-4)
    assert set(backbone_state_dict(network)) == set(dynunet().state_dict())
    assert all(torch.equal(t, dynunet().state_dict()[n]) for n, t in backbone_state_dict(network).items())
    remove_adapter(network, "default")
    assert all(torch.equal(t, dynunet().state_dict()[n]) for n, t in network.state_dict().items())


def test_a_copy_holds_its_modules_twice_as_well():
    network = copy.deepcopy(trained(adapt(dynunet(), LoRA(rank=2, targets=("conv",)))))
    assert network.skip_layers.downsample is network.input_block
    assert summary(network).total == sum(p.numel() for p in network.parameters())


def test_adapters_on_tied_weights_are_exact_and_merging_them_is_refused(tmp_path):
    torch.manual_seed(0)
    x, plain = torch.randn(3, 4), Tied()
    network = trained(adapt(copy.deepcopy(plain), LoRA(rank=2, targets=("first",))))
    expected = network(x)
    before = state_of(network)
    with pytest.raises(ValueError, match="first shares its weight with second, which merging would change too"):
        merge(network)
    assert torch.equal(network(x), expected)
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
    assert torch.allclose(
        load_adapter(copy.deepcopy(plain), save_adapter(network, tmp_path / "a.safetensors"))(x), expected
    )


def test_a_layer_of_its_own_beside_tied_ones_is_merged():
    x = torch.randn(3, 4)
    network = trained(adapt(Tied(), LoRA(rank=2, targets=("own",))))
    expected = network(x)
    assert torch.allclose(merge(network)(x), expected, atol=1e-6)
