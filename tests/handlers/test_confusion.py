"""Metrics of a confusion matrix, against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from ignite.engine import Engine

from monai_petl.handlers import BalancedAccuracy, CohenKappa, MacroF1
from monai_petl.handlers.confusion import OfConfusion

LABELS, PREDICTED = [0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 2, 1, 0, 2, 1]  # two mistakes by one place, one by two


def measured(metric: OfConfusion, labels: Sequence[int], predicted: Sequence[int]) -> float:
    """In two batches of an engine."""
    scores, numbers = torch.eye(metric.num_classes)[list(predicted)], torch.tensor(labels)
    engine = Engine(lambda engine, batch: batch)
    metric.attach(engine, "score")
    engine.run([(scores[:3], numbers[:3]), (scores[3:], numbers[3:])])
    return engine.state.metrics["score"]


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (BalancedAccuracy(3), (3 / 4 + 1 / 2 + 1 / 2) / 3),
        (MacroF1(3), (6 / 8 + 2 / 4 + 2 / 4) / 3),
        (CohenKappa(3), (5 / 8 - 24 / 64) / (1 - 24 / 64)),  # both give the classes 4, 2 and 2 times
        (CohenKappa(3, "linear"), 1 - (2 + 2) / ((8 + 4) * 2 + 8 * 2 * 2) * 8),
        (CohenKappa(3, "quadratic"), 1 - (2 + 4) / ((8 + 4) * 2 + 8 * 4 * 2) * 8),
    ],
)
def test_values_are_those_of_their_definitions(metric: OfConfusion, value: float) -> None:
    assert measured(metric, LABELS, PREDICTED) == pytest.approx(value)


@pytest.mark.parametrize(
    "metric", [BalancedAccuracy, MacroF1, CohenKappa, lambda classes: CohenKappa(classes, "quadratic")]
)
def test_a_class_that_nothing_is_of_does_not_count(metric: Callable[[int], OfConfusion]) -> None:
    assert measured(metric(4), LABELS, PREDICTED) == measured(metric(3), LABELS, PREDICTED)
    assert measured(metric(4), LABELS, LABELS) == 1


def test_a_class_that_is_predicted_and_has_no_image() -> None:
    labels, predicted = [0, 0, 1, 1], [0, 2, 1, 1]
    assert measured(BalancedAccuracy(3), labels, predicted) == pytest.approx((1 / 2 + 1) / 2)
    assert measured(MacroF1(3), labels, predicted) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert measured(CohenKappa(3), labels, predicted) == pytest.approx((3 / 4 - 6 / 16) / (1 - 6 / 16))


def test_one_class_throughout_has_no_kappa() -> None:
    labels = [1, 1, 1, 1]
    assert math.isnan(measured(CohenKappa(3), labels, labels))
    assert measured(BalancedAccuracy(3), labels, labels) == measured(MacroF1(3), labels, labels) == 1
    assert measured(CohenKappa(3), labels, [1, 1, 1, 0]) == 0


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="weights must be None, 'linear' or 'quadratic'; got 'cubic'"):
        CohenKappa(3, "cubic")
