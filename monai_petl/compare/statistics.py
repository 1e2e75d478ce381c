"""Which of the methods is ahead, which are ties, and which give the most for what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Difference", "paired_difference", "pareto_front"]

RESAMPLES = 10_000


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
    first: Mapping[int, Mapping[str, float]], second: Mapping[int, Mapping[str, float]], seed: int = 0
) -> Difference | None:
    """Compare two methods on the cases that both scored, with the seeds that both ran.

    Cases and seeds are resampled with replacement, independently of each other and the same for both methods (the pigeonhole
    bootstrap: A. B. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007). A single seed is not resampled:
    the interval then speaks of other cases, not of other trainings.

    Args:
        first, second: seed -> case -> score.
        seed: of the resampling.

    Returns:
        ``None`` where they share no seed or fewer than two cases.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    cases = sorted(set.intersection(*(set(scores[s]) for scores in (first, second) for s in seeds)))
    if len(cases) < 2:
        return None
    table = np.array([[first[s][c] - second[s][c] for c in cases] for s in seeds])  # (seeds, cases)
    random = np.random.default_rng(seed)
    of_seeds = random.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), RESAMPLES) / len(seeds)
    of_cases = random.multinomial(len(cases), [1 / len(cases)] * len(cases), RESAMPLES) / len(cases)
    means = ((of_seeds @ table) * of_cases).sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(table.mean()), float(low), float(high), len(seeds), len(cases))


def pareto_front(cost: Sequence[float], quality: Sequence[float]) -> list[bool]:
    """Which of the points no other point beats: at most its cost and at least its quality, and better in one of them."""
    c, q = np.asarray(cost, dtype=float), np.asarray(quality, dtype=float)
    finite = np.isfinite(c) & np.isfinite(q)
    no_worse = (c[None] <= c[:, None]) & (q[None] >= q[:, None]) & finite[None]
    better = (c[None] < c[:, None]) | (q[None] > q[:, None])
    return list(finite & ~(no_worse & better).any(1))
