"""Where attention windows lie: partitions, padding, shifts, and what may see what."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.nets.swin_unetr import compute_mask
from torch import Tensor

from monai_petl.networks.punet.windows import FORBIDDEN, PARTITIONS, WindowPlan, effective_window

CPU = torch.device("cpu")
SIZES = st.tuples(st.integers(1, 11), st.integers(1, 11), st.integers(1, 5))
WINDOWS = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))


def plan_of(size, window, partition="block", shifted=True) -> WindowPlan:
    return WindowPlan(size, window, partition, shifted, CPU)


def numbered(plan: WindowPlan) -> Tensor:
    """Voxel numbers (from 1) of each window (P, N); 0 is padding."""
    count = plan.size[0] * plan.size[1] * plan.size[2]
    volume = torch.arange(1.0, count + 1).view(1, *plan.size, 1)
    return plan.split(plan.lay_out(volume)).reshape(plan.num_windows, plan.window_voxels).long()


def members(windows: Tensor) -> set[frozenset[int]]:
    return {frozenset(row.tolist()) for row in windows}


def mark_products(plan: WindowPlan) -> Tensor:
    """What marks add to the scores: (P, N, N), query first."""
    query, key = (m.reshape(plan.num_windows, plan.window_voxels, -1) for m in (plan.query_marks, plan.key_marks))
    return query @ key.mT


def may_see(plan: WindowPlan) -> Tensor:
    """The same by definition, voxel by voxel: (P, N, N), True where the key is real and in the query's region."""
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(n) for n in plan.padded), indexing="ij"), -1)
    start = torch.tensor([p - s for p, s in zip(plan.padded, plan.shift, strict=True)])
    wrapped = (coordinates >= start) & (torch.tensor(plan.shift) > 0)
    wrapped = plan.split(wrapped[None]).reshape(plan.num_windows, plan.window_voxels, 3)
    same_region = (wrapped[:, :, None] == wrapped[:, None]).all(-1)
    return same_region & (numbered(plan) > 0)[:, None]


@pytest.mark.parametrize(
    ("size", "window", "expected"),
    [
        ((112, 112, 1), (8, 8, 1), ([8, 8, 1], [4, 4, 0])),
        ((7, 7, 1), (8, 8, 1), ([7, 7, 1], [0, 0, 0])),
        ((20, 7, 2), (6, 6, 4), ([6, 6, 2], [3, 3, 0])),
        ((8, 9, 4), (8, 8, 3), ([8, 8, 3], [0, 4, 1])),
    ],
)
def test_an_axis_that_fits_has_a_window_of_its_extent_and_no_shift(size, window, expected):
    assert effective_window(size, window) == expected


@given(size=SIZES, window=WINDOWS, partition=st.sampled_from(PARTITIONS), shifted=st.booleans())
def test_partition_followed_by_merge_is_the_identity(size, window, partition, shifted):
    plan = plan_of(size, window, partition, shifted)
    x = torch.randn(2, *size, 3)
    assert torch.equal(plan.merge(plan.split(plan.lay_out(x))), x)


@given(size=SIZES, window=WINDOWS, partition=st.sampled_from(PARTITIONS), shifted=st.booleans())
def test_every_voxel_is_in_exactly_one_window(size, window, partition, shifted):
    plan = plan_of(size, window, partition, shifted)
    windows = numbered(plan)
    count = size[0] * size[1] * size[2]
    assert sorted(windows[windows > 0].tolist()) == list(range(1, count + 1))
    assert windows.shape == (plan.num_windows, plan.window_voxels)


@given(size=SIZES, window=WINDOWS, partition=st.sampled_from(PARTITIONS), shifted=st.booleans())
def test_padding_is_minimal_and_at_the_end_of_each_axis(size, window, partition, shifted):
    plan = plan_of(size, window, partition, shifted)
    for padded, extent, w in zip(plan.padded, size, plan.window, strict=True):
        assert padded % w == 0
        assert 0 <= padded - extent < w
    unshifted = plan_of(size, window, partition, shifted=False)
    x = torch.ones(1, *size, 1)
    laid_out = unshifted.lay_out(x)
    assert laid_out.sum() == x.sum()
    assert torch.equal(laid_out[:, : size[0], : size[1], : size[2]], x)


def test_grid_windows_are_residue_classes():
    plan = plan_of((12, 8, 1), (4, 4, 1), "grid")
    windows = numbered(plan) - 1
    rows, columns = windows // 8, windows % 8
    assert plan.counts == [3, 2, 1]
    assert (rows % 3 == rows[:, :1] % 3).all()
    assert (columns % 2 == columns[:, :1] % 2).all()
    # windows and positions are both ordered along h first
    assert rows[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert columns[0, :4].tolist() == [0, 2, 4, 6]


def test_block_windows_are_contiguous_boxes():
    windows = numbered(plan_of((12, 8, 1), (4, 4, 1), "block", shifted=False)) - 1
    rows, columns = windows // 8, windows % 8
    for extent in (rows, columns):
        assert (extent.amax(1) - extent.amin(1) == 3).all()


@given(size=SIZES, window=WINDOWS)
def test_rolling_by_the_shift_leaves_grid_windows_as_sets_unchanged(size, window):
    plan = plan_of(size, window, "grid", shifted=True)
    assert plan.shift == [0, 0, 0]
    _, shift = effective_window(plan.padded, plan.window)
    volume = torch.arange(plan.padded[0] * plan.padded[1] * plan.padded[2]).view(1, *plan.padded, 1)
    still, rolled = (
        plan.split(v).reshape(plan.num_windows, plan.window_voxels)
        for v in (volume, volume.roll([-s for s in shift], (1, 2, 3)))
    )
    assert members(still) == members(rolled)


def test_shifting_changes_which_voxels_share_a_block_window():
    still, shifted = (members(numbered(plan_of((12, 8, 1), (4, 4, 1), "block", flag))) for flag in (False, True))
    assert still.isdisjoint(shifted)


@given(size=SIZES, window=WINDOWS, partition=st.sampled_from(PARTITIONS), shifted=st.booleans())
def test_marks_exclude_padding_and_other_regions_and_nothing_else(size, window, partition, shifted):
    plan = plan_of(size, window, partition, shifted)
    products, allowed = mark_products(plan), may_see(plan)
    assert (products[allowed] == 0).all()
    assert (products[~allowed] <= -FORBIDDEN).all()


@pytest.mark.parametrize("size", [(8, 8, 4), (12, 8, 2), (8, 4, 4), (16, 12, 1)])
def test_block_regions_agree_with_the_mask_of_swin_unetr(size):
    plan = plan_of(size, (4, 4, 2), "block")
    mask = compute_mask(list(plan.padded), tuple(plan.window), tuple(plan.shift), CPU)
    assert torch.equal(mask == 0, may_see(plan))
    assert torch.equal(mask == 0, mark_products(plan) == 0)


@pytest.mark.parametrize(
    ("partition", "size", "window"),
    [("block", (10, 7, 1), (4, 4, 1)), ("block", (6, 9, 5), (4, 4, 2)), ("grid", (10, 7, 3), (4, 4, 2))],
)
def test_no_attention_weight_crosses_regions_or_falls_on_padding(partition, size, window):
    plan = plan_of(size, window, partition)
    shape = (plan.num_windows, plan.window_voxels, 6)
    query, key = torch.randn(shape) * 4, torch.randn(shape) * 4
    weights = (query @ key.mT * 6**-0.5 + mark_products(plan)).softmax(-1)
    allowed = may_see(plan)
    assert not allowed.all()
    assert weights[~allowed & allowed.any(-1, keepdim=True)].max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_marks_are_exact_in_half_precision(dtype):
    plan = plan_of((10, 7, 5), (4, 4, 2))
    for marks in (plan.query_marks, plan.key_marks):
        assert torch.equal(marks.to(dtype).float(), marks)


def test_a_volume_that_fits_one_window_needs_neither_marks_nor_padding():
    for partition, shifted in itertools.product(PARTITIONS, (False, True)):
        plan = plan_of((3, 4, 1), (8, 8, 1), partition, shifted)
        assert plan.num_windows == 1
        assert plan.padded == [3, 4, 1]
        assert (mark_products(plan) == 0).all()
