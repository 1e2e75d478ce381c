"""Which of the methods is ahead, which are ties, and which give the most for what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["Difference", "efficiency", "paired_difference", "pareto_front"]


@dataclass(frozen=True)
class Difference:
    """Mean difference of two methods over seeds and cases, with a 95 % interval.

    Attributes:
        mean: of the first method minus the second.
        low, high: the interval.
        seeds, cases: how many were paired.
    """

    mean: float
    low: float
    high: float
    seeds: int
    cases: int

    @property
    def tie(self) -> bool:
        """Whether the interval holds 0: the runs do not tell the two apart."""
        return self.low <= 0 <= self.high


def paired_difference(
    first: Mapping[int, Mapping[str, float]], second: Mapping[int, Mapping[str, float]]
) -> Difference | None:
    """Compare two methods on the cases that both scored, with the seeds that both ran.

    Seeds and cases are crossed random effects: the variance of the mean difference is (MS_seeds + MS_cases - MS_rest) / (S C)
    of a two-way analysis of variance, with the degrees of freedom of F. E. Satterthwaite, "An approximate distribution of
    estimates of variance components", Biometrics Bulletin 2(6), 1946. With a single seed the interval speaks of other cases,
    not of other trainings; with a single case (scores that are not by case) of other trainings alone.

    Args:
        first, second: seed -> case -> score.

    Returns:
        ``None`` where they share no two scores.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    cases = sorted(set.intersection(*(set(scores[s]) for scores in (first, second) for s in seeds)))
    if len(seeds) * len(cases) < 2:
        return None
    table = np.array([[first[s][c] - second[s][c] for c in cases] for s in seeds])  # (S, C)
    rows, columns, mean = table.mean(1, keepdims=True), table.mean(0, keepdims=True), table.mean()
    more_seeds, more_cases = len(seeds) - 1, len(cases) - 1
    of_seeds = _mean_square(len(cases) * (rows - mean) ** 2, more_seeds)
    of_cases = _mean_square(len(seeds) * (columns - mean) ** 2, more_cases)
    rest = _mean_square((table - rows - columns + mean) ** 2, more_seeds * more_cases)
    spread = max(of_seeds + of_cases - rest, of_seeds, of_cases)
    parts = ((of_seeds, more_seeds), (of_cases, more_cases), (rest, more_seeds * more_cases))
    below = sum(square**2 / freedom for square, freedom in parts if freedom)
    freedom = spread**2 / below if below > 0 else 1.0
    reach = float(stats.t.ppf(0.975, max(freedom, 1.0))) * float(np.sqrt(spread / table.size))
    return Difference(float(mean), float(mean) - reach, float(mean) + reach, len(seeds), len(cases))


def _mean_square(squares: np.ndarray, freedom: int) -> float:
    return float(squares.sum()) / freedom if freedom else 0.0


def pareto_front(cost: Sequence[float], quality: Sequence[float]) -> list[bool]:
    """Which of the points no other point beats: at most its cost and at least its quality, and better in one of them."""
    c, q = np.asarray(cost, dtype=float), np.asarray(quality, dtype=float)
    finite = np.isfinite(c) & np.isfinite(q)
    no_worse = (c[None] <= c[:, None]) & (q[None] >= q[:, None]) & finite[None]
    better = (c[None] < c[:, None]) | (q[None] > q[:, None])
    return list(finite & ~(no_worse & better).any(1))


def efficiency(score: float, share: float) -> float:
    """A score discounted by what it costs: score exp(-log10(share + 1)); the factor is 0.74 for the whole of the cost.

    With the share of trained parameters this is the performance-parameter efficiency (PPE), with the share of memory the
    performance-memory efficiency (PME) of X. He et al. (arXiv:2210.04428), as FPT+ uses them (arXiv:2408.02426).

    Args:
        score: in any unit.
        share: of full fine-tuning's cost, 0 to 1.

    Raises:
        ValueError: the share is negative.
    """
    if share < 0:
        raise ValueError(f"share must be at least 0, got {share}")
    return score * math.exp(-math.log10(share + 1))
