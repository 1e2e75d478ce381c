"""Means over classes, some of which have no value."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from ignite.engine import Engine
from monai.metrics import AveragePrecisionMetric, ROCAUCMetric

from monai_petl.handlers import ClassMean

NAMES = ["ulcer", "erosion", "tumor"]
PREDICTED = torch.tensor([[0.9, 0.2, 0.7], [0.8, 0.6, 0.1], [0.7, 0.9, 0.3], [0.6, 0.4, 0.2]])
LABELS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
ULCER, EROSION = (1 + 2 / 3) / 2, 1.0  # precision at each positive: ranks 1 and 3 of 4, and 1 and 2


def measured(metric: ClassMean) -> float:
    """In two batches of an engine."""
    engine = Engine(lambda engine, batch: batch)
    metric.attach(engine, "score")
    engine.run([(PREDICTED[:2], LABELS[:2]), (PREDICTED[2:], LABELS[2:])])
    return engine.state.metrics["score"]


def test_the_mean_average_precision_is_that_of_its_definition(caplog) -> None:
    metric = ClassMean(AveragePrecisionMetric("none"), NAMES)
    with caplog.at_level(logging.WARNING):
        assert measured(metric) == pytest.approx((ULCER + EROSION) / 2)
    assert (
        "AveragePrecisionMetric: tumor has no positive or no negative case here and is left out of the mean"
        in caplog.text
    )
    assert metric.values["ulcer"] == pytest.approx(ULCER)
    assert metric.values["erosion"] == pytest.approx(EROSION)
    assert math.isnan(metric.values["tumor"])


def test_as_published_a_class_without_positives_counts_as_zero(caplog) -> None:
    assert measured(ClassMean(AveragePrecisionMetric("none"), NAMES, 0.0)) == pytest.approx((ULCER + EROSION) / 3)
    assert "counts as 0 in the mean" in caplog.text


def test_the_area_of_a_class_is_its_own() -> None:
    """Of the classes without positives none repeats the value of the one before."""
    metric = ClassMean(ROCAUCMetric("none"), NAMES)
    assert measured(metric) == pytest.approx((0.75 + 1) / 2)
    assert (metric.values["ulcer"], metric.values["erosion"]) == pytest.approx((0.75, 1))
    assert math.isnan(metric.values["tumor"])


def test_one_class_alone() -> None:
    metric = ClassMean(ROCAUCMetric("none"), ["ulcer"])
    metric.update((PREDICTED[:, :1], LABELS[:, :1]))
    assert metric.compute() == pytest.approx(0.75)


def test_no_class_has_a_value() -> None:
    metric = ClassMean(ROCAUCMetric("none"), NAMES)
    metric.update((PREDICTED, torch.zeros_like(LABELS)))
    assert math.isnan(metric.compute())
