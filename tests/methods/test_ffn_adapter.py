"""Adapters beside the MLP: the formula restated by hand, counts, what trains, and how they begin."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import TransformerBlock
from torch import Tensor

from monai_petl import adapt, merge, summary
from monai_petl.core.deltas import deltas_of
from monai_petl.methods import FFNAdapter
from tests.conftest import differing, frozen, state_of
from tests.methods.small_networks import (
    TRANSFORMERS,
    build,
    output,
    segresnet,
    shaken,
    swin_unetr,
    teach,
    trained_names,
    unet,
    vit,
    without_gradient,
)


def by_hand(method: FFNAdapter, delta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The output from the MLP's input and output."""
    z = x if method.mode == "parallel" else y
    if method.norm == "in":
        z = F.layer_norm(z, z.shape[-1:], delta["norm_in.weight"], delta["norm_in.bias"])
    z = (z @ delta["down.weight"].T + delta["down.bias"]).clamp(min=0)
    z = z @ delta["up.weight"].T + delta["up.bias"]
    z = z * (delta["scale"] if method.scale is None else method.scale)
    if method.norm == "out":
        z = F.layer_norm(z, z.shape[-1:], delta["norm_out.weight"], delta["norm_out.bias"])
    return y + z


@pytest.mark.parametrize("scale", [0.3, None])
@pytest.mark.parametrize("norm", ["none", "in", "out"])
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_it_computes_the_formula(mode, norm, scale):
    block = shaken(TransformerBlock(12, 24, 3))
    method = FFNAdapter(5, scale, mode, norm)
    plain = copy.deepcopy(block.mlp)
    (_, delta), *others = deltas_of(shaken(adapt(block, method)))
    assert not others
    plain.load_state_dict({n: t for n, t in block.mlp.state_dict().items() if "deltas" not in n})
    x = torch.randn(2, 7, 12)
    with frozen(block, plain):
        assert torch.allclose(block.mlp(x), by_hand(method, delta.state_dict(), x, plain(x)), atol=1e-6)
        y = x + block.attn(block.norm1(x))  # the adapter stands inside the residual branch, behind the norm
        assert torch.allclose(block(x), y + block.mlp(block.norm2(y)), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (FFNAdapter(8), 2 * 24 * 8 + 8 + 24),
        (FFNAdapter(8, norm="in"), 2 * 24 * 8 + 8 + 3 * 24),
        (FFNAdapter(8, norm="out", scale=None), 2 * 24 * 8 + 8 + 3 * 24 + 1),
    ],
    ids=str,
)
def test_the_count_of_a_block(method, count):
    assert summary(adapt(vit(), method)).trainable == 2 * count


@pytest.mark.parametrize("method", [FFNAdapter(8), FFNAdapter(8, None, "sequential", "in")], ids=str)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_starts_as_the_backbone_and_only_adapters_train(name, method):
    backbone, x = build(name)
    network = adapt(copy.deepcopy(backbone), method)
    with frozen(backbone, network):
        assert torch.equal(output(network, x), output(backbone, x))
    before = state_of(network)
    trains = trained_names(network)
    assert all(".mlp.deltas.ffn_default." in n for n in trains)
    teach(network, x, steps=2, lr=1e-3)
    assert not without_gradient(network)
    assert differing(before, state_of(network)) == trains


def test_a_norm_behind_the_adapter_starts_as_the_backbone_too():
    backbone, x = build("ViT")
    network = adapt(copy.deepcopy(backbone), FFNAdapter(8, norm="out"))
    with frozen(backbone, network):
        assert torch.equal(output(network, x), output(backbone, x))


def test_dropout_acts_on_the_adapter_in_training_only():
    network = shaken(adapt(vit(), FFNAdapter(8, dropout=0.5)))
    x = torch.randn(2, 1, 16, 16)
    assert not torch.equal(output(network.train(), x), output(network, x))
    assert torch.equal(output(network.eval(), x), output(network, x))


def test_it_cannot_be_merged():
    with pytest.raises(TypeError, match="FFNAdapterDelta cannot be merged"):
        merge(adapt(vit(), FFNAdapter()))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FFNAdapter(0), "bottleneck must be a whole number of at least 1, got 0"),
        (FFNAdapter(mode="serial"), "mode must be 'parallel' or 'sequential', got 'serial'"),
        (FFNAdapter(norm="both"), "norm must be 'none', 'in' or 'out', got 'both'"),
        (FFNAdapter(dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
    ],
    ids=str,
)
def test_bad_values_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        adapt(vit(), method)


@pytest.mark.parametrize("make", [segresnet, unet])
def test_convolutional_networks_are_refused(make):
    with pytest.raises(TypeError, match=r"has no transformer blocks.*use LoRA"):
        adapt(make(), FFNAdapter())


def test_every_stage_gets_its_own_width():
    widths = [delta.down.in_features for _, delta in deltas_of(adapt(swin_unetr(), FFNAdapter(8)))]
    assert widths == [12, 12, 24, 24, 48, 48, 96, 96]
