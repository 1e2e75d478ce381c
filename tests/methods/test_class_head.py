"""A convolution head of its own for a class, without prompts."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNet

from monai_petl import adapt, adapter_state_dict, remove_adapter, trainable_parameters
from monai_petl.methods import ClassHead
from monai_petl.networks import PUNet
from tests.conftest import differing, small_punet, state_of, train_class

IMAGE = torch.linspace(-9, 9, 2 * 32 * 32).view(2, 1, 32, 32, 1).sin()


def test_the_head_has_130_values():
    assert sum(p.numel() for p in trainable_parameters(adapt(PUNet(), ClassHead("liver")))) == 130


def test_the_head_learns_with_its_statistics_and_the_rest_stays():
    network = adapt(small_punet("spleen"), ClassHead("liver"))
    before = state_of(network)
    train_class(network, "liver", IMAGE, weight_decay=0.1)
    own = {n for n in before if n.startswith("heads.liver.")}
    assert differing(before, network.state_dict()) == own
    assert set(adapter_state_dict(network)) == own
    assert {"heads.liver.norm.running_mean", "heads.liver.norm.running_var"} <= own


def test_other_classes_stay_bit_identical():
    network = small_punet("a", "b").eval().requires_grad_(False)
    with torch.no_grad():
        before = network.segment(IMAGE, ["a", "b"])
    adapt(network, ClassHead("c"))
    train_class(network, "c", IMAGE)
    with torch.no_grad():
        assert torch.equal(network.eval().segment(IMAGE, ["a", "b"]), before)


def test_no_prompts_are_used():
    network = adapt(small_punet("a"), ClassHead("c")).eval()
    with torch.no_grad():
        before = network(IMAGE, ["c", "c"])
        assert torch.equal(before.embedding, network.body(IMAGE))
        for parameter in network.prompts.parameters():
            parameter.add_(1)
        assert torch.equal(network(IMAGE, ["c", "c"]).logits, before.logits)


def test_the_head_takes_the_place_of_prompts_until_it_is_removed():
    network = small_punet("a", "b").eval().requires_grad_(False)
    with torch.no_grad():
        before = network(IMAGE)
        adapt(network, ClassHead("a"))
        assert network.prompts.names == ["b"]
        assert network.classes == ["b", "a"]
        remove_adapter(network)
        assert network.classes == ["a", "b"]
        assert torch.equal(network(IMAGE), before)


@pytest.mark.parametrize("training", [True, False])
def test_a_new_head_has_the_type_and_mode_of_the_network(training):
    network = small_punet().double().train(training)
    adapt(network, ClassHead("a"))
    head = network.heads["a"]
    assert head.conv.weight.dtype == torch.float64
    assert head.norm.training == training


@pytest.mark.parametrize("name", ["", "a.b", "keys"])
def test_names_that_cannot_be_used_are_refused_with_a_sentence(name):
    with pytest.raises(ValueError, match="cannot be used as a class name"):
        adapt(small_punet(), ClassHead(name))


def test_another_network_is_refused_by_name():
    with pytest.raises(TypeError, match=r"ClassHead needs a monai_petl\.networks\.PUNet, got UNet"):
        adapt(UNet(2, 1, 2, (4, 8), (2,)), ClassHead("liver"))
