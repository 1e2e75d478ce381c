"""Bottleneck adapters behind the attention sub-blocks of PUNet."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNet

from monai_petl import adapt, disabled, remove_adapter, trainable_parameters
from monai_petl.methods import BottleneckAdapters
from monai_petl.networks import PUNet
from monai_petl.networks.punet.attention import PromptAttention
from tests.conftest import differing, small_punet, state_of, train_class

IMAGE = torch.linspace(-9, 9, 2 * 32 * 32).view(2, 1, 32, 32, 1).sin()


def attentions(network: PUNet) -> list[PromptAttention]:
    return [module for module in network.modules() if isinstance(module, PromptAttention)]


def test_eighteen_adapters_of_the_default_network_have_324_896_values():
    network = adapt(PUNet(), BottleneckAdapters())
    assert sum(a.adapter is not None for a in attentions(network)) == 18
    assert sum(p.numel() for p in trainable_parameters(network)) == 324_896


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_the_reduction_sets_the_width(reduction):
    network = adapt(small_punet(), BottleneckAdapters(reduction))
    for attention in attentions(network):
        width = attention.qkv.weight.shape[1]
        assert attention.adapter.down.weight.shape == (width // reduction, width)


@pytest.mark.parametrize(
    ("arithmetic", "partition"), [("corrected", "grid"), ("corrected", "block"), ("published", "grid")]
)
@torch.no_grad()
def test_the_start_is_the_backbone_bit_for_bit(arithmetic, partition):
    network = small_punet("a", arithmetic=arithmetic, partition=partition).eval().requires_grad_(False)
    before = network(IMAGE)
    adapt(network, BottleneckAdapters())
    assert torch.equal(network(IMAGE), before)


@torch.no_grad()
def test_the_published_random_start_is_not_the_backbone():
    network = small_punet("a").eval().requires_grad_(False)
    before = network(IMAGE)
    adapt(network, BottleneckAdapters(identity=False))
    assert not torch.allclose(network(IMAGE), before, atol=1e-3)


def test_the_adapters_learn_and_the_body_stays():
    network = adapt(small_punet("a"), BottleneckAdapters())
    before = state_of(network)
    train_class(network, "a", IMAGE, weight_decay=0.1)
    assert differing(before, network.state_dict()) == {n for n in before if ".adapter." in n}


def test_disabled_and_removed_adapters_leave_the_backbone():
    network = small_punet("a").eval().requires_grad_(False)
    with torch.no_grad():
        before = network(IMAGE)
    adapt(network, BottleneckAdapters())
    train_class(network, "a", IMAGE)
    network.eval()
    with torch.no_grad():
        assert not torch.equal(network(IMAGE), before)
        with disabled(network):
            assert torch.equal(network(IMAGE), before)
        remove_adapter(network)
        assert torch.equal(network(IMAGE), before)
    assert all(a.adapter is None for a in attentions(network))


def test_a_second_set_is_refused_and_the_first_stays():
    network = adapt(small_punet("a"), BottleneckAdapters(), name="first")
    before = state_of(network)
    with pytest.raises(ValueError, match="has bottleneck adapters already; remove them first"):
        adapt(network, BottleneckAdapters(), name="second")
    assert differing(before, network.state_dict()) == set()


def test_mistakes_are_answered_with_a_sentence():
    with pytest.raises(ValueError, match="reduction must be at least 1, got 0"):
        adapt(small_punet(), BottleneckAdapters(reduction=0))
    with pytest.raises(TypeError, match=r"BottleneckAdapters needs a monai_petl\.networks\.PUNet, got UNet"):
        adapt(UNet(2, 1, 2, (4, 8), (2,)), BottleneckAdapters())


def test_a_reduction_beyond_the_width_is_refused():
    with pytest.raises(ValueError, match="reduction=16 leaves nothing of 8 channels"):
        adapt(small_punet(), BottleneckAdapters(reduction=16))
