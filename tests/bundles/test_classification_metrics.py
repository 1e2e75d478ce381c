"""What evaluation says of given scores: the same ids in all bundles for classification, and the same values."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow
from torch import Tensor

from tests.bundles.helpers import CLASSIFIERS, Bundle, named, parsed

LABELS = [1, 1, 2, 2, 0, 0]  # of the images in alphabetical order: benign, malignant, normal
PREDICTED = [1, 1, 2, 1, 0, 0]
SCORES = torch.tensor([[0.0, 2, 0], [0, 1, 0.5], [0, 1, 3], [0.5, 1, 0.8], [2, 0, 1], [1.5, 1, 1]]) + torch.tensor(
    [[0.0], [4], [0], [-3], [5], [-2]]
)  # which softmax does not see, and ranks of plain scores do


@pytest.fixture(params=CLASSIFIERS, ids=named)
def each(request: pytest.FixtureRequest) -> Bundle:
    return request.param


def run_with(flow: ConfigWorkflow, scores: Tensor) -> ConfigWorkflow:
    """The workflow, whose network says of the images what is given, in their order."""
    flow.initialize()
    left = list(scores)
    parsed(flow, "network").register_forward_hook(lambda m, i, output: torch.stack([left.pop(0) for _ in output]))
    flow.run()
    assert not left
    return flow


def area(scores: Tensor, positive: Tensor) -> float:
    """The share of pairs of a positive and a negative image that are in their order."""
    pairs = scores[positive][:, None] - scores[~positive]
    return float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())


def areas(scores: Tensor, labels: list[int]) -> float:
    found = [area(scores[:, k], torch.tensor(labels) == k) for k in range(3)]
    return sum(value for value in found if not math.isnan(value)) / sum(not math.isnan(value) for value in found)


def test_every_metric_is_that_of_its_definition(
    each: Bundle, tmp_path: Path, images: Path, weights: dict[str, str]
) -> None:
    assert SCORES.argmax(1).tolist() == PREDICTED
    flow = run_with(each.workflow("evaluate", tmp_path, images, **weights), SCORES)
    found = parsed(flow, "validate::evaluator").state.metrics
    wanted = {
        "val_balanced_accuracy": (1 + 1 + 1 / 2) / 3,
        "val_accuracy": 5 / 6,
        "val_auc": areas(SCORES.softmax(1), LABELS),
        "val_f1": (1 + 4 / 5 + 2 / 3) / 3,
        "val_kappa": (5 / 6 - 1 / 3) / (1 - 1 / 3),
        "val_quadratic_kappa": 1 - 1 / 7,  # one mistake by one place, where chance costs 42 / 6
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert areas(SCORES, LABELS) != pytest.approx(wanted["val_auc"], abs=0.01)
    header = (tmp_path / "eval" / "metrics.csv").read_text(encoding="utf-8")
    assert all(name in header for name in wanted)


def test_the_table_has_probabilities(each: Bundle, tmp_path: Path, images: Path, weights: dict[str, str]) -> None:
    run_with(each.workflow("inference", tmp_path, images, **weights), SCORES)
    with (tmp_path / "eval" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    said = torch.tensor([[float(row[name]) for name in ("normal", "benign", "malignant")] for row in rows])
    torch.testing.assert_close(said, SCORES.softmax(1), atol=2e-6, rtol=0)


def test_a_class_without_images_is_left_out_of_the_means(
    each: Bundle, tmp_path: Path, images: Path, weights: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    shutil.rmtree(data / "validation" / "benign")
    flow = run_with(each.workflow("evaluate", tmp_path, data, **weights), SCORES[2:])  # one is called benign
    found = parsed(flow, "validate::evaluator").state.metrics
    wanted = {
        "val_balanced_accuracy": (1 / 2 + 1) / 2,
        "val_accuracy": 3 / 4,
        "val_auc": areas(SCORES[2:].softmax(1), LABELS[2:]),
        "val_f1": (2 / 3 + 0 + 1) / 3,
        "val_kappa": (3 / 4 - 6 / 16) / (1 - 6 / 16),
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert "benign has no positive or no negative case here and is left out of the mean" in caplog.text
