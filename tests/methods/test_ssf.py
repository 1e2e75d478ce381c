"""SSF: the formula restated by hand, where it attaches, what trains, and folding it into the layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from monai_petl import adapt, merge, merge_and_unload, summary, unmerge
from monai_petl.core.deltas import deltas_of
from monai_petl.methods import SSF
from tests.conftest import differing, frozen, state_of
from tests.methods.small_networks import (
    NETWORKS,
    build,
    output,
    shaken,
    swin_unetr,
    teach,
    trained_names,
    unet,
    unetr,
    vit,
    without_gradient,
)

LAYERS = {  # layer, input, where the channels are
    "Linear": (lambda: nn.Linear(6, 4), (2, 5, 6), -1),
    "LayerNorm": (lambda: nn.LayerNorm(6), (2, 5, 6), -1),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3), (2, 6, 9), 1),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2), (2, 6, 9, 9), 1),
    "Conv3d": (lambda: nn.Conv3d(6, 4, 2), (2, 6, 5, 5, 5), 1),
    "Conv2d, groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 9, 9), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 4, 2, 2), (2, 6, 4, 4), 1),
    "ConvTranspose3d, groups": (lambda: nn.ConvTranspose3d(6, 4, 2, 2, groups=2), (2, 6, 3, 3, 3), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (2, 6, 4, 4), 1),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), (2, 6, 4, 4), 1),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (2, 6, 4, 4), 1),
}
WITHOUT_BIAS = {
    "Linear": (lambda: nn.Linear(6, 4, bias=False), (2, 5, 6), -1),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3, bias=False), (2, 6, 9, 9), 1),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6), (2, 6, 4, 4), 1),
    "LayerNorm": (lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 5, 6), -1),
}


def one_layer(make, size, dim):
    """A network of one layer with SSF as after training, its input, and the output by hand."""
    network = shaken(nn.Sequential(make())).eval()
    x = torch.randn(size)
    plain = network(x).detach()
    adapt(network, SSF(["0"]))
    (_, delta), *_ = deltas_of(network)
    with torch.no_grad():
        delta.scale.normal_(1, 0.5)
        delta.shift.normal_()
    shape = [1] * x.ndim
    shape[dim] = -1
    return network, x, plain * delta.scale.detach().view(shape) + delta.shift.detach().view(shape)


@pytest.mark.parametrize("case", LAYERS)
def test_it_scales_and_shifts_channels_and_can_be_folded_in(case):
    network, x, expected = one_layer(*LAYERS[case])
    before = state_of(network)
    with frozen(network):
        assert torch.allclose(network(x), expected, atol=1e-6)
        merge(network)
        assert torch.allclose(network(x), expected, atol=1e-5)
        assert not torch.equal(network[0].weight, before["0.weight"])
        unmerge(network)
        assert not differing(before, state_of(network))
        merge_and_unload(network)
        assert torch.allclose(network(x), expected, atol=1e-5)
    assert type(network[0]) is type(LAYERS[case][0]())


@pytest.mark.parametrize("case", WITHOUT_BIAS)
def test_a_layer_without_a_bias_cannot_take_the_shift(case):
    network, x, expected = one_layer(*WITHOUT_BIAS[case])
    before = state_of(network)
    with pytest.raises(
        ValueError, match=r"^0 has no bias that could take the shift of SSF; keep the adapter attached$"
    ):
        merge(network)
    assert not differing(before, state_of(network))
    with frozen(network):
        assert torch.allclose(network(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_starts_as_the_backbone_and_only_scales_and_shifts_train(name):
    backbone, x = build(name)
    network = adapt(copy.deepcopy(backbone), SSF())
    with frozen(backbone, network):
        assert torch.equal(output(network, x), output(backbone, x))
    before = state_of(network)
    trains = trained_names(network)
    assert all(n.endswith(("deltas.ssf_default.scale", "deltas.ssf_default.shift")) for n in trains)
    teach(network, x)
    assert not without_gradient(network)
    assert differing(before, state_of(network)) == trains


def test_the_published_start_is_near_the_backbone():
    backbone, x = build("ViT")
    network = adapt(copy.deepcopy(backbone), SSF(init="published"))
    with frozen(backbone, network):
        assert not torch.equal(output(network, x), output(backbone, x))
    scales = torch.cat([delta.scale for _, delta in deltas_of(network)])
    shifts = torch.cat([delta.shift for _, delta in deltas_of(network)])
    assert scales.mean().item() == pytest.approx(1, abs=0.005)
    assert shifts.mean().item() == pytest.approx(0, abs=0.005)
    for values in (scales, shifts):
        assert values.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("make", [vit, unetr])
def test_the_transformer_of_a_network_is_what_it_attaches_to(make):
    network = adapt(make(), SSF())
    names = {module: name.removeprefix("vit.") for name, module in network.named_modules()}
    width, inner, blocks = 24, 48, 2 if make is vit else 12
    in_a_block = ("norm1", "attn.qkv", "attn.out_proj", "norm2", "mlp.linear1", "mlp.linear2")
    expected = {"patch_embedding.patch_embeddings", "norm"}
    expected |= {f"blocks.{i}.{layer}" for i in range(blocks) for layer in in_a_block}
    transformer = {names[layer] for layer, _ in deltas_of(network)}
    assert transformer == expected
    channels = 2 * width + blocks * (width + 3 * width + width + width + inner + width)
    assert summary(network).trainable == 2 * channels


def test_the_transformer_of_swin_unetr_includes_merging():
    network = adapt(swin_unetr(), SSF())
    names = {module: name for name, module in network.named_modules()}
    adapted = {names[layer] for layer, _ in deltas_of(network)}
    assert all(name.startswith("swinViT.") for name in adapted)
    assert "swinViT.layers1.0.downsample.reduction" in adapted
    assert "swinViT.patch_embed.proj" in adapted


def test_a_whole_network_merges_where_every_layer_has_a_bias():
    network = shaken(vit(qkv_bias=True)).eval()
    x = torch.randn(2, 1, 16, 16)
    shaken(adapt(network, SSF()))
    with frozen(network):
        expected = output(network, x)
        assert torch.allclose(output(merge(network), x), expected, atol=1e-5)
    network = shaken(unet()).eval()
    shaken(adapt(network, SSF()))
    with frozen(network):
        expected = output(network, x)
        assert torch.allclose(output(merge(network), x), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "exclude", "left"),
    [(vit, ["*.qkv"], "blocks.0.attn.qkv"), (swin_unetr, ["*.reduction"], "swinViT.layers1.0.downsample.reduction")],
)
def test_layers_without_bias_can_be_left_out_so_that_the_rest_merges(make, exclude, left):
    with pytest.raises(ValueError, match=rf"{left} has no bias"):
        merge(adapt(make(), SSF()))
    merge(adapt(make(), SSF(exclude=exclude)))


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (SSF(init="ones"), ValueError, "init must be 'identity' or 'published', got 'ones'"),
        (SSF(["conv"]), ValueError, "no layer of this ViT has the role 'conv'"),
        (SSF(["*.linear3"]), ValueError, r"no layer of this ViT is called '\*.linear3'.*nearest.*mlp.linear"),
        (SSF("mlp"), ValueError, "must be lists"),
        (SSF(["blocks.0.attn"]), TypeError, "which are SABlock; only Linear"),
    ],
    ids=str,
)
def test_bad_targets_are_refused(method, error, message):
    with pytest.raises(error, match=message):
        adapt(vit(), method)


def test_a_norm_over_several_axes_is_refused():
    with pytest.raises(TypeError, match=r"SSF scales channels; 0 normalises \(3, 4\) values at once"):
        adapt(nn.Sequential(nn.LayerNorm((3, 4))), SSF(["0"]))
