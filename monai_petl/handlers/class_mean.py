"""A metric class by class, averaged over the classes that it is defined for."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric

__all__ = ["ClassMean"]

logger = logging.getLogger(__name__)


class ClassMean(IgniteMetricHandler):
    """The mean of a metric over classes, without those that have no positive or no negative case; these are named in the log.

    Args:
        metric_fn: gives a value for every class, NaN where it is not defined, such as MONAI's ``ROCAUCMetric("none")`` and
            ``AveragePrecisionMetric("none")``.
        class_names: K names.
        undefined: the value of a class without one; default to leave it out. 0 gives the mean average precision of MedFMC,
            where the tumours of the labelled test list of Endo have no positive case.
        output_transform: the evaluator's output -> probabilities and labels of zeros and ones, lists of (K,) each.

    Example::

        ClassMean(ROCAUCMetric("none"), ["erosion", "ulcer"], output_transform=from_engine(["pred", "label"]))
    """

    def __init__(
        self,
        metric_fn: CumulativeIterationMetric,
        class_names: Sequence[str],
        undefined: float | None = None,
        output_transform: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        super().__init__(metric_fn=metric_fn, output_transform=output_transform, save_details=False)
        self.class_names, self.undefined = list(class_names), undefined
        self.values: dict[str, float] = {}

    def compute(self) -> float:
        """The mean; NaN if no class has a value. The values of the classes are in ``values``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning for each class, of which one sentence is made below
            found = [float(value) for value in np.ravel(self.metric_fn.aggregate())]
        self._is_reduced = True
        self.values = dict(zip(self.class_names, found, strict=True))
        missing = [name for name, value in self.values.items() if math.isnan(value)]
        if missing:
            what = "is left out of" if self.undefined is None else f"counts as {self.undefined:g} in"
            logger.warning(
                "%s: %s has no positive or no negative case here and %s the mean",
                type(self.metric_fn).__name__,
                ", ".join(missing),
                what,
            )
        known = [value for value in found if not math.isnan(value)]
        if self.undefined is not None:
            known += len(missing) * [self.undefined]
        return sum(known) / len(known) if known else math.nan
