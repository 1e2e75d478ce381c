"""Sampling, matching and clustering that CPA is made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_petl.losses.prototypes import nearest_points, resample, soft_k_means


def test_nearest_points_are_those_of_an_exhaustive_search():
    generator = torch.Generator().manual_seed(0)
    points = 100 * torch.rand(3, 3, 700, generator=generator)
    reference = 100 * torch.rand(3, 3, 900, generator=generator)
    distances, nearest = nearest_points(points, reference)
    exhaustive = torch.cdist(points.mT.double(), reference.mT.double()).min(dim=-1)
    assert torch.equal(nearest, exhaustive.indices)
    torch.testing.assert_close(distances.double(), exhaustive.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(5, 4, 2), (11, 9, 3), (4, 13, 1)])
def test_resampling_is_that_of_an_identity_grid(size):
    volume = torch.randn(2, 3, 11, 9, 3, generator=torch.Generator().manual_seed(0))
    theta = torch.eye(3, 4).expand(2, 3, 4)
    grid = F.affine_grid(theta, [2, 3, *size], align_corners=False)
    expected = F.grid_sample(volume, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(resample(volume, size), expected, rtol=1e-5, atol=1e-5)


def test_clustering_finds_separate_groups():
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(3)
    group = torch.arange(60) % 3
    embeddings = (directions[group] + 0.05 * torch.randn(60, 3, generator=generator)).T[None]
    positions = torch.zeros(1, 3, 60)
    seeds = torch.tensor([[1.0, 0.4, 0.0], [0.0, 1.0, 0.4], [0.4, 0.0, 1.0]]).T[None]
    result = soft_k_means(
        embeddings, positions, seeds, torch.zeros(1, 3, 3), iterations=5, temperature=0.05, sigma=10.0
    )
    torch.testing.assert_close(result.prototypes[0], torch.eye(3), rtol=0, atol=0.05)
    assert torch.equal(result.assignments[0].argmax(dim=-1), group)


def test_spatial_weight_keeps_prototypes_near_their_place():
    embeddings = torch.ones(1, 2, 100)
    positions = torch.stack([torch.arange(100.0), torch.zeros(100), torch.zeros(100)])[None]
    seeds, places = torch.ones(1, 2, 2), torch.tensor([[20.0, 80.0], [0.0, 0.0], [0.0, 0.0]])[None]
    options = {"iterations": 1, "temperature": 0.1, "sigma": 5.0}
    near = soft_k_means(embeddings, positions, seeds, places, **options)
    everywhere = soft_k_means(embeddings, positions, seeds, places, **options, weight_prototypes=False)
    torch.testing.assert_close(near.positions[0, 0], torch.tensor([20.0, 80.0]), rtol=0, atol=0.1)
    torch.testing.assert_close(everywhere.positions[0, 0], torch.tensor([49.5, 49.5]))
