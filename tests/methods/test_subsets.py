"""Baselines: which tensors train, that all of them do, and how a head for other classes comes and goes."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import ViTAutoEnc
from torch import nn

from monai_petl import (
    adapt,
    backbone_state_dict,
    disabled,
    load_adapter,
    merge_and_unload,
    remove_adapter,
    save_adapter,
    summary,
)
from monai_petl.core.deltas import deltas_of
from monai_petl.core.records import adapters_of
from monai_petl.methods import BiasOnly, FullFineTuning, HeadOnly, LastBlocks, LoRA, NormOnly
from tests.conftest import differing, frozen, state_of
from tests.methods.small_networks import (
    NETWORKS,
    build,
    densenet,
    dynunet,
    flexible_unet,
    output,
    resnet,
    segmenter,
    segresnet,
    shaken,
    swin_unetr,
    teach,
    trained_names,
    unet,
    unetr,
    vit,
    without_gradient,
)

HEADS = {  # network, its head, and the head's layer that makes the classes
    "ViT": (vit, "classification_head", "classification_head.0"),
    "ViT without Tanh": (lambda: vit(post_activation=None), "classification_head", "classification_head"),
    "UNETR": (unetr, "out", "out.conv.conv"),
    "SwinUNETR": (swin_unetr, "out", "out.conv.conv"),
    "SegResNet": (segresnet, "conv_final", "conv_final.2.conv"),
    "DynUNet": (dynunet, "output_block", "output_block.conv.conv"),
    "UNet": (unet, "model.2", "model.2"),
    "UNet of two levels": (lambda: unet((4, 8)), "model.2", "model.2"),
    "UNet without residuals": (lambda: unet(num_res_units=0), "model.2", "model.2"),
    "FlexibleUNet": (flexible_unet, "segmentation_head", "segmentation_head.0"),
    "ResNet": (resnet, "fc", "fc"),
    "DenseNet": (densenet, "class_layers", "class_layers.out"),
    "ViTSegmenter": (segmenter, "decoder", None),
}
EDGE = {"UNETR": 32, "SwinUNETR": 64, "FlexibleUNet": 64}


def headed(case: str) -> tuple[nn.Module, torch.Tensor, str, str | None]:
    make, head, last = HEADS[case]
    network = shaken(make()).eval()
    edge = EDGE.get(case, 16)
    return network, torch.randn(2, 1, edge, edge), head, last


# everything


@pytest.mark.parametrize("name", NETWORKS)
def test_full_fine_tuning_trains_all_that_the_output_depends_on(name):
    network, x = build(name)
    names = {n for n, _ in network.named_parameters()}
    before = state_of(network)
    adapt(network, FullFineTuning())
    trains = trained_names(network)
    assert trains == {n for n in names if "cross_attn" not in n}
    teach(network, x)
    assert not without_gradient(network)
    assert trains <= differing(before, state_of(network))


@pytest.mark.parametrize("kind", ["sincos", "fourier"])
def test_fixed_tables_of_positions_do_not_train(kind):
    network = vit(hidden_size=24, pos_embed_type=kind)
    table = "patch_embedding.position_embeddings"
    before = state_of(network)
    adapt(network, FullFineTuning())
    assert table not in trained_names(network)
    teach(network, torch.randn(2, 1, 16, 16))
    assert torch.equal(before[table], network.state_dict()[table])


def test_a_network_that_was_fine_tuned_is_an_adapter_that_can_be_taken_away(tmp_path):
    backbone, x = build("UNet")
    network = teach(adapt(copy.deepcopy(backbone), FullFineTuning()), x)
    with frozen(network, backbone):
        expected = output(network, x)
        path = save_adapter(network, tmp_path / "full.safetensors")
        assert torch.equal(output(load_adapter(copy.deepcopy(backbone), path).eval(), x), expected)
        with disabled(network):
            assert torch.equal(output(network, x), output(backbone, x))
    assert not differing(backbone_state_dict(network), state_of(backbone))
    remove_adapter(network)
    assert not differing(state_of(network), state_of(backbone))


# biases and norms


@pytest.mark.parametrize("name", NETWORKS)
def test_biases_alone(name):
    network, x = build(name)
    before = state_of(network)
    expected = {n for n, _ in network.named_parameters() if n.endswith(".bias") and "cross_attn" not in n}
    adapt(network, BiasOnly())
    assert trained_names(network) == expected
    teach(network, x)
    assert not without_gradient(network)
    assert differing(before, state_of(network)) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_alone(name):
    network, x = build(name)
    before = state_of(network)
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    modules = {n: m for n, m in network.named_modules() if isinstance(m, norms) and "cross_attn" not in n}
    expected = {f"{n}.{kind}" for n in modules for kind in ("weight", "bias")}
    statistics = {f"{n}.{b}" for n, m in modules.items() for b, _ in m.named_buffers()}
    assert bool(statistics) == (name == "UNet")
    adapt(network, NormOnly())
    assert trained_names(network) == expected
    teach(network, x)
    assert not without_gradient(network)
    assert differing(before, state_of(network)) == expected | statistics


def test_statistics_of_norms_belong_to_the_adapter(tmp_path):
    backbone, x = build("UNet")
    network = teach(adapt(copy.deepcopy(backbone), NormOnly()), x)
    path = save_adapter(network, tmp_path / "norms.safetensors")
    again = load_adapter(copy.deepcopy(backbone), path).eval()
    with frozen(network, again, backbone):
        assert torch.equal(output(again, x), output(network, x))
        with disabled(network):
            assert torch.equal(output(network, x), output(backbone, x))


def test_a_network_without_norms_or_biases_is_refused():
    bare = nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(TypeError, match="this Sequential has no biases"):
        adapt(bare, BiasOnly())
    with pytest.raises(TypeError, match="this Sequential has no norms that train"):
        adapt(bare, NormOnly())


# blocks


@pytest.mark.parametrize(
    ("make", "blocks", "trained"),
    [
        (vit, 1, ["blocks.1."]),
        (vit, 2, ["blocks.0.", "blocks.1."]),
        (unetr, 2, ["vit.blocks.10.", "vit.blocks.11."]),
        (swin_unetr, 1, ["swinViT.layers4.0.blocks.1."]),
        (swin_unetr, 3, [f"swinViT.{n}." for n in ("layers3.0.blocks.1", "layers4.0.blocks.0", "layers4.0.blocks.1")]),
    ],
)
def test_the_last_blocks_across_stages(make, blocks, trained):
    network = shaken(make())
    before = state_of(network)
    adapt(network, LastBlocks(blocks))
    found = trained_names(network)
    assert found == {n for n, _ in network.named_parameters() if n.startswith(tuple(trained)) and "cross_attn" not in n}
    edge = {unetr: 32, swin_unetr: 64}.get(make, 16)
    teach(network, torch.randn(2, 1, edge, edge))
    assert not without_gradient(network)
    assert differing(before, state_of(network)) == found


def test_dropout_of_the_last_blocks_acts_while_that_of_others_does_not():
    network = adapt(vit(dropout_rate=0.3), LastBlocks()).train()
    modes = {n: m.training for n, m in network.named_modules() if isinstance(m, nn.Dropout)}
    assert {n for n, training in modes.items() if training} == {n for n in modes if n.startswith("blocks.1.")}


@pytest.mark.parametrize("blocks", [0, 3, -1, 1.5])
def test_a_wrong_number_of_blocks_is_refused(blocks):
    with pytest.raises(ValueError, match=f"blocks must be between 1 and 2, which this network has; got {blocks}"):
        adapt(vit(), LastBlocks(blocks))


@pytest.mark.parametrize("make", [unet, segresnet, dynunet])
def test_networks_without_blocks_are_refused(make):
    with pytest.raises(TypeError, match="has no transformer blocks"):
        adapt(make(), LastBlocks())


# heads


@pytest.mark.parametrize("case", HEADS)
def test_the_head_that_is_there_trains(case):
    network, x, head, _ = headed(case)
    before = state_of(network)
    adapt(network, HeadOnly())
    trains = trained_names(network)
    assert trains == {n for n, _ in network.named_parameters() if n.startswith(f"{head}.")}
    teach(network, x)
    assert not without_gradient(network)
    changed = differing(before, state_of(network))
    assert trains <= changed
    assert all(n.startswith(f"{head}.") for n in changed)


@pytest.mark.parametrize("case", HEADS)
def test_a_head_for_other_classes_comes_and_goes(case, tmp_path):
    backbone, x, head, last = headed(case)
    network = adapt(copy.deepcopy(backbone), HeadOnly(num_classes=5))
    names = {module: name for name, module in network.named_modules()}
    (layer, _), *others = deltas_of(network)
    assert not others
    assert last is None or names[layer] == last
    before = state_of(network)
    trains = trained_names(network)
    assert all(n.startswith(f"{head}.") for n in trains)
    teach(network, x)
    assert not without_gradient(network)
    assert trains <= differing(before, state_of(network))
    with frozen(backbone, network):
        expected = output(network, x)
        assert expected.shape == (2, 5, *output(backbone, x).shape[2:])
        with disabled(network):
            assert torch.equal(output(network, x), output(backbone, x))
        assert torch.equal(output(network, x), expected)
        path = save_adapter(network, tmp_path / "head.safetensors")
        assert torch.equal(output(load_adapter(copy.deepcopy(backbone), path).eval(), x), expected)
        merge_and_unload(network)
        assert torch.equal(output(network, x), expected)
    assert not adapters_of(network)
    assert not any("deltas" in n for n in network.state_dict())
    plain = backbone.state_dict()
    assert list(network.state_dict()) == list(plain)
    other = {n for n, t in network.state_dict().items() if t.shape != plain[n].shape}
    assert other
    assert all(n.startswith(last or head) for n in other)


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("case", HEADS)
def test_a_head_for_other_classes_beside_a_method(case, head_first):
    network, x, head, _ = headed(case)
    before = state_of(network)
    methods = [LoRA(rank=2), HeadOnly(num_classes=5)]
    adapt(network, methods[::-1] if head_first else methods)
    teach(network, x, steps=3)
    assert not without_gradient(network)
    assert output(network, x).shape[1] == 5
    assert all(n.startswith(f"{head}.") for n in differing(before, state_of(network)))


def test_a_head_of_any_name():
    network = adapt(vit(), HeadOnly(head="blocks.1.mlp"))
    assert summary(network).trainable == 2 * 24 * 48 + 24 + 48


@pytest.mark.parametrize(
    ("make", "method", "error", "message"),
    [
        (vit, HeadOnly(num_classes=0), ValueError, "num_classes must be a whole number of at least 1, got 0"),
        (vit, HeadOnly(num_classes=2.0), ValueError, "num_classes must be a whole number of at least 1, got 2.0"),
        (
            vit,
            HeadOnly(head="neck"),
            ValueError,
            "this ViT has no head called 'neck'; give its name as head=, its parts",
        ),
        (
            lambda: vit(classification=False),
            HeadOnly(),
            ValueError,
            "this ViT has no head called 'classification_head'",
        ),
        (lambda: dynunet(True), HeadOnly(5), ValueError, "this DynUNet has further heads for deep supervision"),
        (vit, HeadOnly(5, head="norm"), ValueError, "the head 'norm' has no linear layer and no convolution"),
    ],
)
def test_heads_that_are_not_there_are_refused(make, method, error, message):
    network = make()
    text = str(network)
    with pytest.raises(error, match=message):
        adapt(network, method)
    assert str(network) == text
    assert all(p.requires_grad for n, p in network.named_parameters() if "position" not in n)


def test_the_head_of_an_autoencoder_is_its_last_convolution():
    network = adapt(ViTAutoEnc(1, (16, 16), (4, 4), 1, 4, 24, 48, 1, 3, spatial_dims=2), HeadOnly())
    trained = {name.rpartition(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"conv3d_transpose_1"}


# merging


@pytest.mark.parametrize("method", [FullFineTuning(), HeadOnly(), BiasOnly(), NormOnly(), LastBlocks()], ids=str)
def test_there_is_nothing_to_fold_in(method):
    network, x = build("ViT")
    teach(adapt(network, method), x)
    before = state_of(network)
    expected = output(network, x)
    merge_and_unload(network)
    assert not adapters_of(network)
    assert not differing(before, state_of(network))
    with torch.no_grad():
        assert torch.allclose(output(network, x), expected, atol=1e-6)
