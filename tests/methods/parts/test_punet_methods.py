"""The methods that prompt tuning is compared with: what trains in each, and what stays."""

from __future__ import annotations

import copy

import pytest
import torch

from monai_petl import adapt, disabled, load_adapter, remove_adapter, save_adapter, summary
from monai_petl.methods import PUNET_METHODS, adapt_punet, punet_method
from monai_petl.networks import PUNet
from tests.conftest import differing, frozen, small_punet, state_of, train_class

IMAGE = torch.linspace(-9, 9, 2 * 32 * 32).view(2, 1, 32, 32, 1).sin()
BODY = 6_758_304
COUNTS = {
    "prompt": 57_344,
    "prompt_encoder": 35_840,
    "prompt_decoder": 22_016,
    "prompt_start": 3_072,
    "prompt_end": 512,
    "prompt_bias": 57_344 + 15_392,
    "head": 130,
    "bias": 15_392 + 130,
    "adapter": 324_896 + 130,
    "lora": 239_104 + 130,
    "decoder": 2_948_512 + 130,
    "full": BODY + 57_344 + 512,
    "full_head": BODY + 130,
    "scratch": BODY + 57_344 + 512,
}


def adapted(network: PUNet, method: str) -> PUNet:
    chosen = punet_method(method, "new")
    return adapt(network, chosen.methods, chosen.also_train)


def test_every_method_has_a_count_here():
    assert set(COUNTS) == set(PUNET_METHODS)


@pytest.mark.parametrize("method", COUNTS)
def test_the_published_number_of_values_trains(method):
    assert summary(adapted(PUNet(), method)).trainable == COUNTS[method]


@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
@pytest.mark.parametrize("method", PUNET_METHODS)
def test_what_trains_receives_a_gradient_and_nothing_else_does(method, arithmetic):
    network = adapted(small_punet("old", arithmetic=arithmetic), method).train()
    network(IMAGE, ["new", "new"]).logits.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("method", PUNET_METHODS)
def test_a_step_changes_what_trains_and_nothing_else(method):
    network = adapted(small_punet("old"), method)
    before = state_of(network)
    train_class(network, "new", IMAGE, steps=1, weight_decay=0.1)
    changed = differing(before, network.state_dict())
    trains = {n for n, p in network.named_parameters() if p.requires_grad}
    statistics = {n for n in changed if n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert changed - statistics == trains
    # statistics move where the whole normalisation layer trains
    assert {n.rpartition(".")[0] + ".weight" for n in statistics} <= trains
    if method in ("full", "full_head", "scratch"):
        assert {n for n in before if n.startswith("body.") and n.endswith("running_mean")} <= changed


@pytest.mark.parametrize("method", PUNET_METHODS)
def test_keeping_the_body_means_that_other_classes_are_bit_identical(method):
    network = small_punet("old").eval().requires_grad_(False)
    with torch.no_grad():
        before = network.segment(IMAGE, ["old"])
    adapted(network, method)
    train_class(network, "new", IMAGE, steps=1)
    with frozen(network):
        same = torch.equal(network.eval().segment(IMAGE, ["old"]), before)
    assert same == punet_method(method, "new").keeps_body


@pytest.mark.parametrize("method", PUNET_METHODS)
def test_every_method_can_be_saved_loaded_and_removed(method, tmp_path):
    backbone = small_punet("old").eval()
    network = adapted(copy.deepcopy(backbone), method)
    train_class(network, "new", IMAGE, steps=1)
    network.eval()
    fresh = load_adapter(copy.deepcopy(backbone), save_adapter(network, tmp_path / "new.safetensors")).eval()
    with frozen(fresh, network):
        assert torch.equal(fresh(IMAGE), network(IMAGE))
    remove_adapter(network)
    assert differing(state_of(backbone), network.state_dict()) == set()
    with frozen(network.eval(), backbone):
        assert torch.equal(network(IMAGE), backbone(IMAGE))


def test_only_training_from_scratch_ignores_the_pretrained_weights():
    assert [name for name in PUNET_METHODS if not punet_method(name, "new").pretrained] == ["scratch"]


@pytest.mark.parametrize("method", ["prompt", "prompt_end", "full"])
def test_the_start_of_the_prompts_can_be_chosen(method):
    (method,) = punet_method(method, "new", init="copy:old").methods
    assert method.init == "copy:old"
    assert method.class_name == "new"


def test_an_unknown_method_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"method must be one of prompt, prompt_encoder, .*; got 'sorcery'"):
        punet_method("sorcery", "new")


def test_before_the_new_class_the_adapted_network_segmented_the_base_classes(tmp_path):
    torch.save(small_punet("liver", "spleen").state_dict(), tmp_path / "model.pt")
    network = small_punet("liver", "spleen", "pancreas")  # as a bundle builds it, with a place for the class
    adapt_punet(network, "prompt", "pancreas", tmp_path / "model.pt")
    assert network.active_classes == ["pancreas"]
    with disabled(network):
        assert network.active_classes == ["liver", "spleen"]
    remove_adapter(network)
    assert network.classes == network.active_classes == ["liver", "spleen"]
