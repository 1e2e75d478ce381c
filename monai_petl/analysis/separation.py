"""How well features of classes lie apart, and how features of one class are spread.

Definitions of scatter: W. Zu et al., "Embedded prompt tuning", arXiv:2407.01003, equation 11; of the collapse of classes: V.
Papyan et al., PNAS 117(40), 2020. The rest is standard. All but the raw traces stay when features are multiplied by a number,
which matters: a method that shrinks features shrinks their scatter too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import stats
from scipy.signal import find_peaks
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Scatter",
    "Separation",
    "Spread",
    "linear_cka",
    "nearest_centroid_accuracy",
    "principal_axes",
    "scatter",
    "separation",
    "spread",
]


@dataclass(frozen=True)
class Scatter:
    """Covariance (D, D) within classes, between their means, and in all; the first two add up to the third."""

    within: Tensor
    between: Tensor
    total: Tensor


def scatter(features: Tensor, labels: Tensor) -> Scatter:
    """
    Args:
        features: (n, D).
        labels: (n,), numbers of classes.

    Raises:
        ValueError: the shapes do not fit.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must be (n, D) and labels (n,); got {list(features.shape)} and {list(labels.shape)}"
        )
    x = features.double()
    one_hot = F.one_hot(labels.long()).double()
    one_hot = one_hot[:, one_hot.any(0)]
    means = one_hot.T @ x / one_hot.sum(0)[:, None]
    inner, outer = x - one_hot @ means, one_hot @ means - x.mean(0)
    centred = x - x.mean(0)
    n = len(x)
    return Scatter(inner.T @ inner / n, outer.T @ outer / n, centred.T @ centred / n)


@dataclass(frozen=True)
class Separation:
    """Numbers on how far classes lie apart.

    Attributes:
        within: trace of the scatter within classes.
        between: trace of the scatter between them.
        fisher: between / within.
        collapse: NC1, trace(within between^+) / K: 0 where every class is one point.
        same_cosine, cross_cosine: mean cosine of pairs of one class and of two.
        same_distance, cross_distance: mean Euclidean distance of such pairs, over the root of the total trace.
        silhouette: mean over the samples, -1 to 1.
    """

    within: float
    between: float
    fisher: float
    collapse: float
    same_cosine: float
    cross_cosine: float
    same_distance: float
    cross_distance: float
    silhouette: float

    def to_dict(self) -> Mapping[str, float]:
        return asdict(self)


def separation(features: Tensor, labels: Tensor) -> Separation:
    """
    Args:
        features: (n, D), for instance class tokens after the last norm.
        labels: (n,); of a set with several labels, one class at a time: whether an image has it.

    Returns:
        NaN for everything, with a warning, where a class has fewer than two samples or there is one class only.

    Raises:
        ValueError: the shapes do not fit.
    """
    found = scatter(features, labels)
    counts = labels.long().bincount()
    counts = counts[counts > 0]
    if len(counts) < 2 or counts.min() < 2:
        warnings.warn(
            f"separation needs two classes of two samples at least; there are {len(counts)}, the smallest of "
            f"{int(counts.min()) if len(counts) else 0}",
            stacklevel=2,
        )
        return Separation(*9 * [math.nan])
    x = features.double()
    within, between = float(found.within.trace()), float(found.between.trace())
    same = labels[:, None] == labels[None]
    pairs = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    unit = F.normalize(x, dim=1)
    cosine, distance = unit @ unit.T, torch.cdist(x, x) / found.total.trace().sqrt()
    return Separation(
        within,
        between,
        between / within if within else math.inf,
        float((found.within @ torch.linalg.pinv(found.between, rtol=1e-8)).trace()) / len(counts),
        float(cosine[same & pairs].mean()),
        float(cosine[~same].mean()),
        float(distance[same & pairs].mean()),
        float(distance[~same].mean()),
        _silhouette(distance, labels),
    )


def _silhouette(distance: Tensor, labels: Tensor) -> float:
    """P. Rousseeuw, Journal of Computational and Applied Mathematics 20, 1987."""
    one_hot = F.one_hot(labels.long()).to(distance)
    one_hot = one_hot[:, one_hot.any(0)]
    sums, counts = distance @ one_hot, one_hot.sum(0)
    own = one_hot.bool()
    inner = sums[own] / (counts @ one_hot.T - 1)
    outer = (sums / counts).masked_fill(own, math.inf).amin(1)
    return float(((outer - inner) / torch.maximum(inner, outer)).mean())


@dataclass(frozen=True)
class Spread:
    """How features of one class lie along their first principal axis.

    Attributes:
        deviation, quartiles, extent: standard deviation, distance of the quartiles, largest minus smallest.
        modes: peaks of a Gaussian kernel estimate of the density, of at least a tenth of the highest.
        bimodality: (skewness^2 + 1) / kurtosis: 1/3 for a normal, 5/9 for a uniform one, 1 for two points.
        gap: largest distance of neighbours over the extent.
    """

    deviation: float
    quartiles: float
    extent: float
    modes: int
    bimodality: float
    gap: float


def spread(features: Tensor) -> Spread:
    """
    Args:
        features: (n, D) of one class; the axis is fitted to these.

    Raises:
        ValueError: there are fewer than three.
    """
    if len(features) < 3:
        raise ValueError(f"a spread needs three samples at least, got {len(features)}")
    along = np.sort(principal_axes(features, 1)[:, 0].cpu().numpy())
    extent = float(along[-1] - along[0])
    places = np.linspace(along[0] - 0.1 * extent, along[-1] + 0.1 * extent, 512)
    density = stats.gaussian_kde(along)(places)
    return Spread(
        float(along.std()),
        float(np.subtract(*np.percentile(along, [75, 25]))),
        extent,
        len(find_peaks(density, height=0.1 * density.max())[0]),
        float((stats.skew(along) ** 2 + 1) / stats.kurtosis(along, fisher=False)),
        float(np.diff(along).max()) / extent,
    )


def principal_axes(features: Tensor, count: int = 2) -> Tensor:
    """Features (n, D) along their ``count`` principal axes, (n, count); the sign is that of the largest value of an axis."""
    centred = features.double() - features.double().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:count]
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return centred @ (axes * signs).T


def nearest_centroid_accuracy(training: Tensor, labels: Tensor, features: Tensor, wanted: Tensor) -> float:
    """Share of ``features`` (m, D) whose class ``wanted`` (m,) is that of the nearest mean of the training features (n, D)."""
    classes = labels.unique()
    means = torch.stack([training[labels == label].mean(0) for label in classes])
    return float((classes[torch.cdist(features, means).argmin(1)] == wanted).float().mean())


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Similarity of features (n, D) and (n, D') of the same samples, 0 to 1 (S. Kornblith et al., arXiv:1905.00414)."""
    x, y = (features.double() - features.double().mean(0) for features in (first, second))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))
