"""The matched loss: against values computed by hand, and what it promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from monai_petl.losses import MatchedMaskLoss
from monai_petl.losses.matched_masks import match
from monai_petl.networks import SAN
from tests.networks.san.test_network import TEST_SIZE, backbone


def prediction(batch: int = 2, queries: int = 5, classes: int = 3, grid=(4, 4), seed: int = 0, aux: int = 0) -> dict:
    random = torch.Generator().manual_seed(seed)
    one = {
        "pred_logits": torch.randn(batch, queries, classes + 1, generator=random).requires_grad_(),
        "pred_masks": (3 * torch.randn(batch, queries, *grid, generator=random)).requires_grad_(),
    }
    return {**one, "aux_outputs": [prediction(batch, queries, classes, grid, seed + i + 1) for i in range(aux)]}


def labels(*size: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, classes, (size[0], 1, *size[1:]), generator=torch.Generator().manual_seed(seed))


def test_two_queries_and_one_target_by_hand() -> None:
    masks = torch.tensor([[[[2.0, -1.0], [0.5, -3.0]], [[-2.0, 4.0], [1.0, -1.0]]]])
    logits = torch.tensor([[[1.0, 0.0, -1.0], [0.2, 0.7, 0.1]]])
    label = torch.tensor([[[[0, 1], [1, 0]]]])
    loss = MatchedMaskLoss(include_background=False)
    found = loss({"pred_logits": logits, "pred_masks": masks}, label)
    target = (label[0, 0] == 1).float().flatten()
    costs = []
    for query in range(2):
        x = masks[0, query].flatten()
        bce = F.binary_cross_entropy_with_logits(x, target)
        dice = 1 - (2 * (x.sigmoid() * target).sum() + 1) / (x.sigmoid().sum() + target.sum() + 1)
        costs.append((5 * bce + 5 * dice, 5 * bce + 5 * dice - 2 * logits[0, query].softmax(0)[1]))
    taken = min(range(2), key=lambda q: float(costs[q][1]))
    assert taken == 1
    wanted = torch.tensor([2, 1])  # the other query holds no object
    weights = torch.tensor([0.1, 1.0])
    ce = (F.cross_entropy(logits[0], wanted, reduction="none") * weights).sum() / weights.sum()
    torch.testing.assert_close(found, 2 * ce + costs[taken][0])


def test_matching_is_the_cheapest_assignment() -> None:
    cost = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    queries, targets = match(cost)
    best = min(itertools.permutations(range(4), 3), key=lambda chosen: sum(cost[q, t] for t, q in enumerate(chosen)))
    assert sorted(zip(targets.tolist(), queries.tolist(), strict=True)) == list(enumerate(best))
    order = [2, 0, 1]
    again = dict(zip(*(x.tolist() for x in reversed(match(cost[:, order]))), strict=True))
    assert {order[t]: q for t, q in again.items()} == dict(zip(targets.tolist(), queries.tolist(), strict=True))


def test_the_order_of_queries_does_not_matter() -> None:
    given, label = prediction(), labels(2, 8, 8)
    order = [3, 1, 4, 0, 2]
    shuffled = {name: value[:, order] for name, value in given.items() if name != "aux_outputs"}
    torch.testing.assert_close(MatchedMaskLoss()(shuffled, label), MatchedMaskLoss()(given, label))


def test_levels_count_alike() -> None:
    given, label = prediction(aux=1), labels(2, 8, 8)
    alone = [MatchedMaskLoss()({**level, "aux_outputs": []}, label) for level in (given, given["aux_outputs"][0])]
    torch.testing.assert_close(MatchedMaskLoss()(given, label), alone[0] + alone[1])


@pytest.mark.parametrize("dense", [48**3, 0])
def test_an_image_without_targets_has_no_mask_terms(dense) -> None:
    given = prediction(aux=1)
    loss = MatchedMaskLoss(include_background=False, dense=dense)(given, torch.zeros(2, 1, 8, 8))
    loss.backward()
    no_object = torch.full((10,), 3)
    ce = [F.cross_entropy(level["pred_logits"].flatten(0, 1), no_object) for level in (given, *given["aux_outputs"])]
    torch.testing.assert_close(loss, 2 * sum(ce))
    assert given["pred_masks"].grad is None or not given["pred_masks"].grad.any()


def test_masks_are_divided_by_their_number_at_least_one() -> None:
    given, label = prediction(batch=1), labels(1, 8, 8)
    twice = {n: torch.cat((v, v)) for n, v in given.items() if n != "aux_outputs"}
    torch.testing.assert_close(MatchedMaskLoss()(twice, torch.cat((label, label))), MatchedMaskLoss()(given, label))


@pytest.mark.parametrize("grid", [(8, 8), (6, 8, 4)])
def test_random_points_tend_to_the_dense_grid(grid) -> None:
    """Uniform points alone estimate the mean over the grid; the uncertain ones only weigh it."""
    torch.manual_seed(0)
    smooth = F.interpolate(
        torch.randn(1, 3, *[3] * len(grid)), grid, mode="bilinear" if len(grid) == 2 else "trilinear"
    )
    given = {"pred_logits": torch.randn(1, 3, 4), "pred_masks": 4 * smooth}
    label = labels(1, *(2 * g for g in grid))
    dense = MatchedMaskLoss()
    random = MatchedMaskLoss(dense=0, num_points=40_000)
    queries, targets = dense._matched(given["pred_logits"][0], given["pred_masks"][0], *_found(label))
    again = random._matched(given["pred_logits"][0], given["pred_masks"][0], *_found(label))
    assert torch.equal(queries, again[0])
    assert torch.equal(targets, again[1])
    loss = random(given, label)
    assert loss.isfinite()
    assert loss > 0.5 * dense(given, label)


def _found(label: Tensor) -> tuple[Tensor, Tensor]:
    classes = label[0, 0].unique()
    return classes, torch.stack([(label[0, 0] == c).float() for c in classes])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_changes_nothing(dtype) -> None:
    given, label = prediction(batch=1, grid=(320, 320)), labels(1, 320, 320)
    wanted = MatchedMaskLoss()(given, label)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(MatchedMaskLoss()(given, label), wanted)


def test_uncertain_points_lie_where_masks_are_undecided() -> None:
    place = torch.linspace(-4, 4, 64).expand(1, 64, 64)  # decided on the left and on the right
    loss = MatchedMaskLoss(num_points=400)
    points = loss._uncertain_points(place)
    assert tuple(points.shape) == (1, 400, 2)
    assert ((points[0, :300, 1] - 0.5).abs() < 0.3).all()
    assert (points[0, 300:, 1] - 0.5).abs().max() > 0.4


@pytest.mark.parametrize("dense", [48**3, 0])
def test_a_network_learns_by_it(dense) -> None:
    torch.manual_seed(0)
    network = SAN(backbone((32, 32), (16, 16)), 3, (32, 32), mode="matched", num_queries=6, **TEST_SIZE).train()
    label = torch.zeros(1, 1, 32, 32)
    label[..., 4:16, 4:16], label[..., 20:30, 8:28] = 1, 2
    image = label / 2 + 0.05 * torch.randn(1, 1, 32, 32)
    loss = MatchedMaskLoss(dense=dense, num_points=256)
    optimiser = torch.optim.AdamW(network.side.parameters(), lr=2e-3)
    first = loss(network(image), label).item()
    for _ in range(60):
        optimiser.zero_grad()
        loss(network(image), label).backward()
        optimiser.step()
    assert loss(network(image), label).item() < 0.3 * first
    found = network.eval()(image).argmax(1)
    assert (found == label[:, 0]).float().mean() > 0.95


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dictionary that SAN\(mode='matched'\) returns in training, got Tensor"):
        MatchedMaskLoss()(torch.rand(1, 3, 8, 8), labels(1, 8, 8))
    with pytest.raises(ValueError, match="the target has class 3, the network knows 0 to 2"):
        MatchedMaskLoss()(prediction(batch=1), torch.full((1, 1, 8, 8), 3))


def test_costs_that_are_no_numbers_do_not_stop_the_matching() -> None:
    queries, targets = match(torch.tensor([[math.nan, 1.0], [2.0, math.inf]]))
    assert sorted(targets.tolist()) == [0, 1]
    assert dict(zip(queries.tolist(), targets.tolist(), strict=True)) == {0: 1, 1: 0}
