"""Soft clustering of embeddings with prototypes that have a place in space, and the sampling and matching around it.

The numerical part of contrastive prototype assignment; see `monai_petl.losses.cpa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Prototypes", "nearest_points", "resample", "soft_k_means"]


class Prototypes(NamedTuple):
    """Soft clustering of N points with P prototypes."""

    prototypes: Tensor
    """(B, C, P), of unit length"""
    positions: Tensor
    """(B, 3, P) voxels, z scaled"""
    assignments: Tensor
    """(B, N, P), each row sums to one"""
    point_positions: Tensor
    """(B, 3, N) voxels, z scaled: the points that were clustered"""


def soft_k_means(
    embeddings: Tensor,
    positions: Tensor,
    seeds: Tensor,
    seed_positions: Tensor,
    *,
    iterations: int,
    temperature: float,
    sigma: float,
    weight_prototypes: bool = True,
    weight_targets: bool = False,
    normalise: bool = False,
) -> Prototypes:
    """Soft k-means on cosine similarity, with a Gaussian weight on the distance between point and prototype.

    Args:
        embeddings: points (B, C, N), of any length.
        positions: (B, 3, N) of the points.
        seeds: initial prototypes (B, C, P).
        seed_positions: (B, 3, P) of the seeds; they move with the prototypes.
        iterations, temperature, weight_prototypes, weight_targets, normalise: see `CPALoss`.
        sigma: standard deviation of the spatial weight, in the unit of the positions.
    """
    unit = F.normalize(embeddings, dim=1)
    values = torch.cat([unit if normalise else embeddings, positions], dim=1)  # (B, C + 3, N), averaged together
    prototypes, centres = F.normalize(seeds, dim=1), seed_positions
    for _ in range(iterations):
        weights = (unit.mT @ (prototypes / temperature)).softmax(dim=-1)  # (B, N, P)
        if weight_prototypes:
            weights *= _spatial_weight(positions, centres, sigma)
        total = weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        means = values @ weights / total  # (B, C + 3, P)
        prototypes, centres = F.normalize(means[:, :-3], dim=1), means[:, -3:]
    assignments = (unit.mT @ (prototypes / temperature)).softmax(dim=-1)
    if weight_targets:
        assignments *= _spatial_weight(positions, centres, sigma)
        assignments /= assignments.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(assignments.dtype).tiny)
    return Prototypes(prototypes, centres, assignments, positions)


def nearest_points(positions: Tensor, reference_positions: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (B, M) to, and index (B, M) of, the nearest of N reference points for each of M points.

    Exact: by differences of coordinates, since the matrix-product form of a distance loses about 1e-4 voxels. Worked
    off in slices that fit a processor's cache, so that the (B, M, N) distances never exist at once.
    """
    batch, _, reference_points = reference_positions.shape
    elements = 2**26 if positions.is_cuda else 2**19
    slices = positions.split(max(elements // (batch * reference_points), 1), dim=-1)
    nearest = [_squared_distances(part, reference_positions).min(dim=-1) for part in slices]
    squared = torch.cat([part.values for part in nearest], dim=1)
    return squared.sqrt(), torch.cat([part.indices for part in nearest], dim=1)


def resample(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Trilinear samples (B, C, *size) of a volume (B, C, h, w, d) on a regular grid of cell centres, edges not aligned.

    The same numbers as `grid_sample` on an identity grid, but nothing has to be kept for the backward pass.
    """
    return F.interpolate(volume, size=list(size), mode="trilinear", align_corners=False)


def _spatial_weight(positions: Tensor, centres: Tensor, sigma: float) -> Tensor:
    """(B, N, P): 1 where a point and a centre coincide, 0.5 at half the full width at half maximum."""
    return _squared_distances(positions, centres).mul_(-0.5 / sigma**2).exp_()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, M) between positions (B, 3, N) and (B, 3, M), by explicit differences."""
    a, b = a.unsqueeze(3), b.unsqueeze(2)
    squared = (a[:, 0] - b[:, 0]).square_()
    for axis in (1, 2):
        difference = a[:, axis] - b[:, axis]
        squared.addcmul_(difference, difference)
    return squared
