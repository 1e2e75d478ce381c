"""Norms of tokens, conditions of a scaling, calibration, the handler and the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from monai.networks.nets import UNETR, UNet, ViT
from safetensors.torch import load_file
from torch import Tensor, nn

import monai_petl as mp
from monai_petl.analysis import (
    FeatureSeparation,
    expected_calibration_error,
    outliers,
    plot_features,
    plot_gates,
    plot_norms,
    scaling_conditions,
    separation,
    token_norms,
)
from monai_petl.methods import EPT, attention_gates
from monai_petl.networks import ViTClassifier


def classifier() -> ViTClassifier:
    vit = ViT(1, (32, 32), (8, 8), 24, 48, 3, 3, spatial_dims=2, classification=True, qkv_bias=True)
    return ViTClassifier(vit, 3, (32, 32), pool="class").eval()


def test_norms_are_those_of_the_last_norm() -> None:
    network, x = classifier(), torch.randn(2, 1, 32, 32)
    norms = token_norms(network, x)
    assert norms.shape == (3, 2, 17)
    torch.testing.assert_close(norms[-1, :, 0], network.features(x).norm(dim=1).detach())
    assert token_norms(UNETR(1, 2, (32, 32, 32), 4, 24, 48, 3).eval(), torch.randn(1, 1, 32, 32, 32)).shape == (
        12,
        1,
        8,
    )
    with pytest.raises(TypeError, match=r"token norms need a vision transformer .* got UNet"):
        token_norms(UNet(2, 1, 2, (4, 8), (2,)), x)
    assert not any(module._forward_hooks for module in network.modules())


def test_what_sticks_out_is_found() -> None:
    norms = torch.linspace(9, 11, 50).repeat(2, 1)
    norms[1, 7] = 40
    assert outliers(norms).nonzero().tolist() == [[1, 7]]


def test_the_conditions_of_the_lemma() -> None:
    """The larger, the less is left of it, and still the larger one: all pairs meet both."""
    norms, labels = torch.linspace(1, 4, 12), torch.arange(12) % 2
    found = scaling_conditions(norms, norms**-0.5, labels)
    assert (found.shrinks_large, found.keeps_order, found.both) == (1.0, 1.0, 1.0)
    found = scaling_conditions(norms, norms**-2, labels)
    assert (found.shrinks_large, found.keeps_order, found.both) == (1.0, 0.0, 0.0)
    assert scaling_conditions(norms, norms / 4, labels).shrinks_large == 0.0


def test_calibration() -> None:
    sure, half = torch.tensor([[1.0, 0]]).repeat(10, 1), torch.tensor([[0.7, 0.3]]).repeat(10, 1)
    right = torch.zeros(10, dtype=torch.long)
    wrong = torch.tensor([0] * 7 + [1] * 3)
    assert expected_calibration_error(sure, right) == 0
    assert expected_calibration_error(half, wrong) == pytest.approx(0, abs=1e-6)
    assert expected_calibration_error(sure, wrong) == pytest.approx(0.3)
    both = expected_calibration_error(torch.cat((sure, half)), torch.cat((wrong, right)))
    assert both == pytest.approx((0.3 * 10 + 0.3 * 10) / 20)


class TwoClasses(nn.Module):
    """Features that are the image's, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_the_handler_says_what_the_functions_say(tmp_path: Path) -> None:
    network, x, labels = TwoClasses(), torch.randn(12, 4), torch.arange(12) % 2
    x[labels == 1] += 4

    def step(engine: Engine, places: Tensor) -> list[dict]:
        with torch.no_grad():
            scores = network(x[places]).softmax(1)
        return [{"pred": score, "label": int(labels[place])} for score, place in zip(scores, places, strict=True)]

    engine = Engine(step)
    path = tmp_path / "eval" / "separation.json"
    FeatureSeparation(network.head, str(path)).attach(engine)
    for _ in range(2):  # the second run starts anew
        engine.run(torch.arange(12).split(5))
    found = engine.state.metrics
    wanted = separation(x, labels)
    assert found["separation_fisher"] == pytest.approx(wanted.fisher, rel=1e-5)
    assert found["separation_centroid"] == 1.0
    with torch.no_grad():
        error = expected_calibration_error(network(x).softmax(1), labels)
    assert found["calibration_error"] == pytest.approx(error)
    assert json.loads(path.read_text(encoding="utf-8")) == found
    assert torch.equal(load_file(path.with_suffix(".safetensors"))["features"], x)
    assert not network.head._forward_pre_hooks


def test_the_handler_refuses_what_it_is_not_for_and_leaves_no_hook(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must be a \.json file, got 'x\.pt'"):
        FeatureSeparation(nn.Linear(2, 2), "x.pt")
    network = TwoClasses()

    def step(engine: Engine, x: Tensor) -> list[dict]:
        return [{"pred": score, "label": torch.tensor([0.0, 1.0])} for score in network(x).detach()]

    engine = Engine(step)
    FeatureSeparation(network.head).attach(engine)
    with pytest.raises(ValueError, match="for one label an image, got rows of 2"):
        engine.run([torch.randn(3, 4)])
    assert not network.head._forward_pre_hooks


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    network, x = mp.adapt(classifier(), EPT(), also_train=["head"]).eval(), torch.randn(4, 1, 32, 32)
    norms = plot_norms({"before": token_norms(classifier(), x), "tuned": token_norms(network, x)})
    assert [line.get_label() for line in norms.axes[0].lines] == ["before", "tuned"]
    gates = plot_gates(attention_gates(network, x), (4, 4))
    assert [ax.get_title() for ax in gates.axes[:3]] == [f"{block}: 1.00, class 1.00" for block in (1, 2, 3)]
    features = plot_features(
        {"before": torch.randn(9, 5), "tuned": torch.randn(9, 5)}, torch.arange(9) % 3, ["a", "b", "c"]
    )
    assert [ax.get_title() for ax in features.axes] == ["before", "tuned"]
    for name, figure in (("norms", norms), ("gates", gates), ("features", features)):
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 2000
