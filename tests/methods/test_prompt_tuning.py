"""Prompt tuning of PUNet: a class is a small set of tokens, and nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

from monai_petl import adapt, load_adapter, remove_adapter, trainable_parameters
from monai_petl.methods import ClassHead, PromptTuning, export_class
from monai_petl.networks import PUNet
from tests.conftest import differing, frozen, small_punet, state_of, train_class

IMAGE = torch.linspace(-9, 9, 2 * 32 * 32).view(2, 1, 32, 32, 1).sin()


@pytest.mark.parametrize(("tokens", "values"), [(1, 7_904), (4, 17_792), (8, 30_976), (16, 57_344), (32, 110_080)])
def test_one_class_trains_the_published_number_of_values(tokens, values):
    network = adapt(PUNet(tokens_per_class=tokens), PromptTuning("liver"))
    assert sum(p.numel() for p in trainable_parameters(network)) == values


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"depth": "encoder"}, 35_840),
        ({"depth": "decoder"}, 22_016),
        ({"depth": "start"}, 3_072),
        ({"depth": "end"}, 512),
        ({"own_background": True}, 57_344 + 512),
    ],
)
def test_options_train_the_published_number_of_values(options, values):
    network = adapt(PUNet(), PromptTuning("liver", **options))
    assert sum(p.numel() for p in trainable_parameters(network)) == values


@pytest.mark.parametrize("depth", ["full", "encoder", "decoder", "start", "end"])
@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
def test_all_tokens_of_the_class_learn_and_nothing_else(depth, arithmetic):
    network = small_punet("spleen", arithmetic=arithmetic)
    adapt(network, PromptTuning("liver", depth=depth, own_background=True))
    before = state_of(network)
    train_class(network, "liver", IMAGE, weight_decay=0.1)
    own = {n for n in before if n.startswith("prompts.classes.liver.")}
    assert differing(before, network.state_dict()) == own
    assert {n for n, p in network.named_parameters() if p.grad is not None} == own


def test_training_lowers_the_loss_of_the_class():
    network = adapt(small_punet(), PromptTuning("liver"))
    target = (IMAGE[:, 0] > 0.3).long()

    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(network(IMAGE, ["liver"] * 2).logits, target))

    before = loss()
    train_class(network, "liver", IMAGE, steps=15)
    assert loss() < 0.9 * before


def test_adding_and_training_a_class_leaves_all_other_logits_bit_identical():
    network = small_punet("a", "b").eval().requires_grad_(False)
    with torch.no_grad():
        before = network.segment(IMAGE, ["a", "b"]), network(IMAGE, ["b", "a"]).logits
    for name in ("c", "d"):
        adapt(network, PromptTuning(name, init="mean"), name=name)
        train_class(network, name, IMAGE, weight_decay=0.1)
    network.eval()
    with torch.no_grad():
        assert torch.equal(network.segment(IMAGE, ["a", "b"]), before[0])
        assert torch.equal(network(IMAGE, ["b", "a"]).logits, before[1])
        torch.testing.assert_close(network(IMAGE)[:, :3], before[0], atol=1e-5, rtol=1e-5)


def test_more_than_ten_classes_can_be_taught_one_after_another():
    network = small_punet()
    names = [f"organ{i}" for i in range(11)]
    for name in names:
        adapt(network, PromptTuning(name), name=name)
        train_class(network, name, IMAGE, steps=1)
    assert network.classes == names
    with torch.no_grad():
        assert network.eval()(IMAGE[:1]).shape == (1, 12, 32, 32, 1)


def test_a_class_may_start_from_another_one():
    network = small_punet("left kidney").eval().requires_grad_(False)
    adapt(network, PromptTuning("right kidney", init="copy:left kidney"))
    with torch.no_grad():
        out = network(IMAGE)
    assert torch.equal(out[:, 1], out[:, 2])


def test_prompts_take_the_place_of_a_convolution_head_until_they_are_removed():
    network = adapt(small_punet("a"), ClassHead("b"), name="head").eval()
    twin = copy.deepcopy(network)
    with pytest.raises(ValueError, match="class 'b' belongs to adapter 'head'"):
        adapt(network, PromptTuning("b"), name="prompts")
    remove_adapter(twin, "head")
    twin.heads["b"] = copy.deepcopy(network.heads["b"])  # part of the backbone
    adapt(twin, PromptTuning("b"), name="prompts")
    assert not twin.heads
    train_class(twin, "b", IMAGE, steps=1)
    remove_adapter(twin, "prompts")
    assert list(twin.heads) == ["b"]
    with frozen(twin, network):
        assert torch.equal(twin.eval()(IMAGE), network(IMAGE))


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        (PromptTuning("b", init="zeros"), ValueError, "init must be .*'zeros'"),
        (PromptTuning("b", init="copy:c"), KeyError, "unknown class 'c'; this network has prompts for: a"),
        (PromptTuning("b", depth="half"), ValueError, "prompt depth must be one of .*'half'"),
        (PromptTuning("b.c"), ValueError, "'b.c' cannot be used as a class name"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(method, error, says):
    network = small_punet("a")
    with pytest.raises(error, match=says):
        adapt(network, method)
    assert network.classes == ["a"]
    assert all(p.requires_grad for p in network.parameters())


def test_another_network_is_refused_by_name():
    with pytest.raises(TypeError, match=r"PromptTuning needs a monai_petl\.networks\.PUNet, got UNet"):
        adapt(UNet(2, 1, 2, (4, 8), (2,)), PromptTuning("liver"))


def test_a_class_of_pretraining_is_exported_and_loads_into_another_network(tmp_path):
    network = small_punet("liver", "spleen").eval()
    path = export_class(network, "spleen", tmp_path / "spleen.safetensors")
    other = small_punet("liver").eval()
    other.load_state_dict({n: t for n, t in network.state_dict().items() if ".spleen." not in n})
    load_adapter(other, path)
    image = torch.randn(1, 1, 32, 32, 1)
    with torch.no_grad():
        assert torch.equal(other(image), network(image))
    with pytest.raises(KeyError, match="unknown class 'kidney'"):
        export_class(network, "kidney", tmp_path / "kidney.safetensors")
