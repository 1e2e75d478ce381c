"""The classifier around a ViT: what its head reads, what it takes, and its weights from a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from monai.networks.nets import UNet, ViT
from torch import nn

from monai_petl import adapt, load_adapter, save_adapter, summary
from monai_petl.methods import FullFineTuning, HeadOnly, LoRA
from monai_petl.networks import ViTClassifier, load_backbone, vit_backbone
from tests.bundles.helpers import checkpoint_state
from tests.methods.small_networks import teach, trained_names, without_gradient

SIZES = {"hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 3}
IMAGE = torch.linspace(-3, 3, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()


def vit(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(
        3, (32, 32), (8, 8), **SIZES, spatial_dims=2, classification=True, post_activation=None, **options
    ).eval()


def classifier(**options) -> ViTClassifier:
    return ViTClassifier(vit(), 4, (32, 32), **options).eval()


def test_reading_the_class_token_alone_it_is_monais_classifier():
    reference = vit(num_classes=4)
    network = ViTClassifier(copy.deepcopy(reference), 4, (32, 32), pool="class").eval()
    network.head.load_state_dict(reference.classification_head.state_dict())
    assert torch.equal(network(IMAGE), reference(IMAGE)[0])
    assert not any(n.startswith("backbone.classification_head") for n in network.state_dict())


def test_what_the_head_reads():
    tokens, _ = (lambda backbone: (delattr(backbone, "classification_head"), backbone(IMAGE))[1])(vit())
    expected = {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    expected["class_mean"] = torch.cat((expected["class"], expected["mean"]), 1)
    for pool, features in expected.items():
        torch.testing.assert_close(classifier(pool=pool).features(IMAGE), features)


def test_volumes():
    backbone = ViT(1, (16, 16, 16), (8, 8, 8), **SIZES, classification=False)
    assert ViTClassifier(backbone, 3, (16, 16, 16), pool="mean")(torch.rand(2, 1, 16, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ViTClassifier(UNet(2, 1, 2, (4, 8), (2,)), 2, (32, 32)), TypeError, "needs a MONAI ViT .* got UNet"),
        (lambda: classifier(head_layers=-1), ValueError, "head_layers must be 0 or more hidden layers, got -1"),
        (lambda: classifier(pool="max"), ValueError, "pool must be one of class, mean, class_mean; got 'max'"),
        (
            lambda: ViTClassifier(ViT(3, (32, 32), (8, 8), **SIZES, spatial_dims=2), 2, (32, 32)),
            ValueError,
            "this ViT has none; use pool='mean'",
        ),
        (
            lambda: classifier()(torch.rand(1, 3, 64, 64)),
            ValueError,
            r"for images of \(32, 32\), got \[64, 64\]; resize them",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_linear_probe_keeps_nothing_of_the_backbone():
    network = adapt(classifier(), HeadOnly())
    assert trained_names(network) == {"head.weight", "head.bias"}
    assert summary(network).trainable == 4 * 48 + 4


def test_a_head_with_hidden_layers_is_trained_whole_and_comes_back_from_its_file(tmp_path: Path):
    network = adapt(classifier(head_layers=3), HeadOnly())
    kinds = [type(layer) for layer in network.head]
    assert kinds == 3 * [nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Dropout] + [nn.Linear]
    assert summary(network).trainable == 3 * (48 * 48 + 48 + 2 * 48) + 4 * 48 + 4
    torch.testing.assert_close(network.head[-1].bias.sigmoid(), torch.full((4,), 0.01))
    before = copy.deepcopy(network.backbone.state_dict())
    teach(network, IMAGE)
    assert not without_gradient(network)
    assert float(network.head[2].running_mean.abs().max()) > 0  # statistics of the head belong to it, and are kept
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.backbone.state_dict().items())
    path = save_adapter(network, tmp_path / "head.safetensors")
    again = load_adapter(classifier(head_layers=3), path)
    assert torch.equal(again.eval()(IMAGE), network.eval()(IMAGE))


def test_another_number_of_classes_is_one_argument():
    network = adapt(classifier(), [LoRA(rank=2), HeadOnly(num_classes=7)])
    teach(network, IMAGE)
    assert network(IMAGE).shape == (2, 7)
    assert not without_gradient(network)


def test_all_of_it_trains_in_full_fine_tuning():
    network = adapt(classifier(), FullFineTuning())
    teach(network, IMAGE)
    assert not without_gradient(network)
    assert trained_names(network) == {n for n, _ in network.named_parameters() if "norm_cross_attn" not in n}


def test_dropout_stands_in_front_of_the_head():
    network = classifier(dropout=0.5)
    assert torch.equal(network(IMAGE), network(IMAGE))
    network.train()
    assert not torch.equal(network(IMAGE), network(IMAGE))


def test_a_checkpoint_goes_into_the_backbone(tmp_path: Path):
    torch.save(checkpoint_state(), tmp_path / "vit.pth")
    backbone = vit_backbone(1, (32, 32), (8, 8), hidden_size=24, mlp_dim=96, num_layers=4, num_heads=4)
    network = ViTClassifier(backbone, 3, (32, 32))
    head, body = copy.deepcopy(network.head), copy.deepcopy(network.backbone)
    assert load_backbone(network, tmp_path / "vit.pth") is network
    assert all(torch.equal(a, b) for a, b in zip(network.head.parameters(), head.parameters(), strict=True))
    moved = [
        n
        for (n, a), b in zip(body.named_parameters(), network.backbone.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert "blocks.0.attn.qkv.weight" in moved
    assert isinstance(network.backbone.norm, nn.LayerNorm)


def test_it_is_exported_with_any_batch():
    network = classifier()
    program = torch.export.export(network, (IMAGE,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
    more = torch.cat((IMAGE, IMAGE.flip(0), IMAGE[:1]))
    torch.testing.assert_close(program.module()(more), network(more))
