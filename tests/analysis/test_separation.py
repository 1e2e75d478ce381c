"""Separation and spread of features, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from monai_petl.analysis import linear_cka, nearest_centroid_accuracy, principal_axes, scatter, separation, spread


def features(
    classes: int = 3, each: int = 20, width: int = 5, apart: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    means = apart * torch.randn(classes, width, generator=generator)
    return means[labels] + torch.randn(classes * each, width, generator=generator), labels


@given(seed=st.integers(0, 1000), classes=st.integers(1, 4))
def test_within_and_between_add_up_to_the_total(seed: int, classes: int) -> None:
    found = scatter(*features(classes, 6, seed=seed))
    torch.testing.assert_close(found.within + found.between, found.total, atol=1e-6, rtol=0)


def test_within_is_the_formula() -> None:
    x, labels = features()
    wanted = torch.zeros(5, 5, dtype=torch.double)
    for label in range(3):
        mean = x[labels == label].double().mean(0)
        for sample in x[labels == label].double():
            wanted += torch.outer(sample - mean, sample - mean) / len(x)
    torch.testing.assert_close(scatter(x, labels).within, wanted)


def test_a_factor_changes_the_traces_and_nothing_else() -> None:
    x, labels = features()
    one, quarter = separation(x, labels).to_dict(), separation(0.25 * x, labels).to_dict()
    assert quarter["within"] == pytest.approx(one["within"] / 16)
    for name in one.keys() - {"within", "between"}:
        assert quarter[name] == pytest.approx(one[name], rel=1e-6), name


def test_classes_that_lie_further_apart_are_said_to() -> None:
    near, far = (separation(*features(apart=apart)) for apart in (0.5, 5.0))
    assert far.fisher > 10 * near.fisher
    assert far.collapse < near.collapse
    assert far.silhouette > near.silhouette
    assert far.cross_distance - far.same_distance > near.cross_distance - near.same_distance
    assert far.same_cosine - far.cross_cosine > near.same_cosine - near.cross_cosine


def test_two_points_by_hand() -> None:
    x, labels = torch.tensor([[0.0, 1], [0, 3], [4, 1], [4, 3]]), torch.tensor([0, 0, 1, 1])
    found = separation(x, labels)
    assert (found.within, found.between, found.fisher) == pytest.approx((1, 4, 4))
    assert found.same_distance == pytest.approx(2 / math.sqrt(5))
    assert found.cross_distance == pytest.approx((4 + math.sqrt(20)) / 2 / math.sqrt(5))
    assert found.silhouette == pytest.approx(1 - 2 / ((4 + math.sqrt(20)) / 2))
    assert separation(torch.tensor([[1.0], [1], [2], [2]]), labels).collapse == 0


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 0, 0, 1]])
def test_too_few_samples_give_no_number_and_say_so(labels: list[int]) -> None:
    with pytest.warns(UserWarning, match="two classes of two samples at least; there are"):
        found = separation(torch.randn(4, 3), torch.tensor(labels))
    assert all(math.isnan(value) for value in found.to_dict().values())
    with pytest.raises(ValueError, match=r"features must be \(n, D\) and labels \(n,\); got \[4, 3\] and \[2\]"):
        separation(torch.randn(4, 3), torch.tensor([0, 1]))


def test_two_modes_are_told_from_one() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(400, 3, generator=generator)
    two = one + torch.tensor([12.0, 0, 0]) * (torch.arange(400) % 2)[:, None]
    narrow, wide = spread(one), spread(two)
    assert (narrow.modes, wide.modes) == (1, 2)
    assert wide.bimodality > 0.8 > 0.5 > narrow.bimodality
    assert wide.gap > 0.3 > narrow.gap
    assert wide.deviation > narrow.deviation
    assert wide.quartiles > narrow.quartiles
    with pytest.raises(ValueError, match="three samples at least, got 2"):
        spread(one[:2])


def test_principal_axes_are_those_of_the_largest_variance() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 9, 3])
    along = principal_axes(x)
    assert along.shape == (200, 2)
    assert torch.corrcoef(torch.stack((along[:, 0].float(), x[:, 1])))[0, 1] > 0.99
    assert torch.corrcoef(torch.stack((along[:, 1].float(), x[:, 2])))[0, 1] > 0.98


def test_centroids_and_similarity() -> None:
    x, labels = features(apart=6.0)
    assert nearest_centroid_accuracy(x, labels, x, labels) == 1.0
    assert nearest_centroid_accuracy(x, labels, -x, labels) < 0.5
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)))
    assert linear_cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, torch.randn(60, 5, generator=torch.Generator().manual_seed(3))) < 0.3
