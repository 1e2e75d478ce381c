"""Metrics of a confusion matrix, over the classes that are there: ignite's recall is 0 for a class that has no image.

Cohen's kappa (J. Cohen, 1960; weighted: 1968) is the agreement with the labels beyond chance. All values are those of
scikit-learn, which ignite's own kappa would need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from ignite.metrics import ConfusionMatrix
from torch import Tensor

__all__ = ["BalancedAccuracy", "CohenKappa", "MacroF1"]

POWERS = {None: 0, "linear": 1, "quadratic": 2}  # of the distance between two classes


class OfConfusion(ConfusionMatrix):
    """Base of metrics that need the confusion matrix alone; several processes add theirs up.

    Args:
        num_classes: K, at least 2.
        output_transform: the evaluator's output -> scores (B, K) and numbers of classes (B,).
    """

    def __init__(self, num_classes: int, output_transform: Callable[[Any], Any] = lambda output: output) -> None:
        super().__init__(num_classes, output_transform=output_transform)

    def compute(self) -> float:
        """The value; NaN where it is not defined."""
        return self.value_of(super().compute().double())

    def value_of(self, matrix: Tensor) -> float:
        """Of a matrix (K, K), whose rows are labels and whose columns are predictions."""
        raise NotImplementedError


class BalancedAccuracy(OfConfusion):
    """The mean recall of the classes that have an image, in [0, 1].

    Example::

        BalancedAccuracy(3, output_transform=lambda output: (output["pred"], output["label"]))
    """

    def value_of(self, matrix: Tensor) -> float:
        return float((matrix.diag() / matrix.sum(1)).nanmean())


class MacroF1(OfConfusion):
    """The mean over classes of 2 TP / (2 TP + FP + FN), in [0, 1]; without those that no image has and none is taken for."""

    def value_of(self, matrix: Tensor) -> float:
        return float((2 * matrix.diag() / (matrix.sum(0) + matrix.sum(1))).nanmean())


class CohenKappa(OfConfusion):
    """Cohen's kappa: 1 for no mistake, 0 for chance; NaN where labels and predictions are one class throughout.

    Args:
        num_classes: K, at least 2.
        weights: ``None``: all mistakes count alike; ``"linear"`` or ``"quadratic"``: by the distance of the two classes, for
            classes that are grades.
        output_transform: the evaluator's output -> scores (B, K) and numbers of classes (B,).

    Raises:
        ValueError: there are no such weights.
    """

    def __init__(
        self,
        num_classes: int,
        weights: str | None = None,
        output_transform: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        if weights not in POWERS:
            raise ValueError(f"weights must be None, 'linear' or 'quadratic'; got {weights!r}")
        super().__init__(num_classes, output_transform)
        self.power = POWERS[weights]

    def value_of(self, matrix: Tensor) -> float:
        places = torch.arange(len(matrix), dtype=matrix.dtype)
        distance = (places[:, None] - places).abs()
        cost = distance**self.power * (distance > 0)
        by_chance = float((cost * matrix.sum(1)[:, None] * matrix.sum(0)).sum() / matrix.sum())
        return 1 - float((cost * matrix).sum()) / by_chance if by_chance else math.nan
