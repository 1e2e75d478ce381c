"""Methods by name: what a config gets, and the groups of an optimiser."""

from __future__ import annotations

import pytest
from monai.networks.nets import ViT
from torch import nn

from monai_petl import trainable_parameters
from monai_petl.core.deltas import deltas_of
from monai_petl.core.records import adapters_of
from monai_petl.methods import AIM, METHODS, LoRA, adapt_by_name, method_by_name, parameter_groups


def vit() -> ViT:
    sizes = {"hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 3}
    return ViT(1, (16, 16), (8, 8), spatial_dims=2, classification=True, qkv_bias=True, **sizes)


HEAD = ["classification_head"]


def test_options_are_the_arguments_of_the_method() -> None:
    assert method_by_name("lora", {"rank": 3}) == LoRA(rank=3)
    assert method_by_name("aim") == AIM()
    assert method_by_name("head") is None


def test_wrong_names_and_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"method must be one of lora, vpetl, .*; got 'prompt'"):
        method_by_name("prompt")
    with pytest.raises(ValueError, match=r"method_options \{'ranks': 3\} do not fit the method lora: .*'ranks'"):
        method_by_name("lora", {"ranks": 3})
    with pytest.raises(ValueError, match=r"the method head has no options, got \{'rank': 3\}"):
        method_by_name("head", {"rank": 3})


@pytest.mark.parametrize("method", METHODS)
def test_the_head_trains_with_every_method_and_every_tensor_is_in_one_group(method: str) -> None:
    network = adapt_by_name(vit(), method, HEAD)
    assert list(adapters_of(network)) == [method]
    assert all(p.requires_grad for p in network.classification_head.parameters())
    groups = parameter_groups(network, HEAD, lr=1.0, delta_lr=2.0, backbone_lr=3.0, weight_decay=0.5)
    assert [group["lr"] for group in groups] == [1.0, 2.0, 3.0]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0, 0.5]
    head, deltas, backbone = ([id(p) for p in group["params"]] for group in groups)
    assert sorted(head + deltas + backbone) == sorted(id(p) for p in trainable_parameters(network))
    assert head == [id(p) for p in network.classification_head.parameters()]
    assert set(deltas) == {id(p) for _, delta in deltas_of(network) for p in delta.parameters()}
    assert bool(backbone) == (method in ("aim", "bias", "norm", "last_blocks", "full", "scratch"))


def test_a_network_that_the_method_cannot_handle_is_refused() -> None:
    with pytest.raises(TypeError, match="Sequential"):
        adapt_by_name(nn.Sequential(nn.Conv2d(1, 1, 3)), "vpetl")
