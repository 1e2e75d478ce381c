"""One rule a tensor: what depth, channels and sizes do to it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.nets.swin_unetr import PatchMerging, PatchMergingV2, WindowAttention

from monai_petl.inflation import (
    RelativePositionBias,
    adapt_in_channels,
    fold_normalization,
    inflate_kernel,
    inflate_merging_norm,
    inflate_merging_reduction,
    inflate_rel_bias,
    inflate_transposed_kernel,
    resize_kernel,
    resize_pos_embed,
    resize_rel_bias,
)

MODES = ("center", "average")
DEPTHS = (1, 2, 3, 4, 5, 16)


@pytest.mark.parametrize(("mode", "depth"), itertools.product(MODES, DEPTHS))
def test_an_inflated_kernel_sums_to_the_2d_kernel(mode: Any, depth: int) -> None:
    kernel = torch.randn(4, 2, 3, 5)
    for axis in range(3):
        deep = inflate_kernel(kernel, depth, mode, axis)
        assert deep.shape[2 + axis] == depth
        torch.testing.assert_close(deep.sum(2 + axis), kernel, atol=1e-6, rtol=0)


@pytest.mark.parametrize("depth", DEPTHS)
def test_center_fills_the_upper_middle_plane_and_average_all_equally(depth: int) -> None:
    kernel = torch.randn(4, 2, 3, 3)
    center, average = inflate_kernel(kernel, depth), inflate_kernel(kernel, depth, "average")
    assert [z for z in range(depth) if center[..., z].any()] == [depth // 2]
    assert torch.equal(center[..., depth // 2], kernel)
    assert all(torch.equal(average[..., z], average[..., 0]) for z in range(depth))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_equal_channels_give_what_the_grey_image_gives_in_three_colours(channels: int) -> None:
    kernel, grey = torch.randn(4, 3, 3, 3), torch.randn(1, 1, 9, 9)
    adapted = adapt_in_channels(kernel, channels)
    torch.testing.assert_close(
        F.conv2d(grey.repeat(1, channels, 1, 1), adapted), F.conv2d(grey.repeat(1, 3, 1, 1), kernel), atol=1e-5, rtol=0
    )


def test_keep_leaves_colours_alone_and_needs_as_many_channels() -> None:
    kernel = torch.randn(4, 3, 3, 3)
    assert torch.equal(adapt_in_channels(kernel, 3, "keep"), kernel)
    assert not torch.equal(adapt_in_channels(kernel, 3), kernel)
    with pytest.raises(ValueError, match="keep needs the source's 3 channels, the network has 1"):
        adapt_in_channels(kernel, 1, "keep")


def test_folded_normalisation_takes_the_image_as_it_is() -> None:
    kernel, bias, image = torch.randn(4, 3, 2, 2), torch.randn(4), torch.rand(2, 3, 6, 6)
    mean, std = [0.4, 0.5, 0.3], [0.2, 0.1, 0.3]
    normal = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    folded = F.conv2d(image, *fold_normalization(kernel, bias, mean, std), stride=2)
    torch.testing.assert_close(folded, F.conv2d(normal, kernel, bias, stride=2), atol=1e-5, rtol=1e-5)


def test_a_transposed_kernel_gives_the_2d_result_in_every_plane() -> None:
    kernel, image = torch.randn(3, 2, 2, 2), torch.randn(1, 3, 4, 4)
    deep = F.conv_transpose3d(
        image.unsqueeze(-1).repeat(1, 1, 1, 1, 3), inflate_transposed_kernel(kernel, 2), stride=(2, 2, 2)
    )
    flat = F.conv_transpose2d(image, kernel, stride=2)
    assert torch.allclose(deep, flat.unsqueeze(-1).expand_as(deep), atol=1e-6)


def test_a_resized_kernel_answers_a_resized_patch_as_before() -> None:
    kernel, patch = torch.randn(5, 3, 4, 4), torch.randn(1, 3, 4, 4)
    larger = F.interpolate(patch, (6, 7), mode="bilinear")
    torch.testing.assert_close(
        F.conv2d(larger, resize_kernel(kernel, (6, 7))), F.conv2d(patch, kernel), atol=1e-4, rtol=1e-4
    )
    assert resize_kernel(kernel, (2, 2)).shape == (5, 3, 2, 2)


@given(h=st.integers(1, 4), w=st.integers(1, 4), depth=st.integers(1, 4), axis=st.integers(0, 2))
def test_token_h_w_d_carries_the_position_of_h_w(h: int, w: int, depth: int, axis: int) -> None:
    grid = torch.randn(h, w, 2)
    tokens = resize_pos_embed(grid.reshape(1, h * w, 2), (h, w), (h, w), depth, axis)
    sizes = [h, w]
    sizes.insert(axis, depth)
    places = torch.movedim(tokens.reshape(*sizes, 2), axis, 2)  # (h, w, d, C)
    assert torch.equal(places, grid.unsqueeze(2).expand(h, w, depth, 2))


def test_positions_on_the_same_grid_stay_bit_for_bit_and_other_grids_need_not_be_square() -> None:
    table = torch.randn(1, 12, 5)
    assert torch.equal(resize_pos_embed(table, (4, 3), (4, 3)), table)
    assert resize_pos_embed(table, (4, 3), (2, 7), depth=3).shape == (1, 42, 5)
    with pytest.raises(ValueError, match=r"12 entries, which is no grid of \(5, 3\)"):
        resize_pos_embed(table, (5, 3), (2, 2))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_bias_of_two_voxels_is_that_of_their_in_plane_offset(axis: int) -> None:
    window, depth, heads = (3, 2), 2, 4
    table = torch.randn(5 * 3, heads)
    flat, deep_window = WindowAttention(8, heads, window), [*window]
    deep_window.insert(axis, depth)
    deep = WindowAttention(8, heads, deep_window)
    biases = inflate_rel_bias(table, window, depth, axis)[deep.relative_position_index]  # (N3, N3, heads)
    query = {0: "d h w", 1: "h d w", 2: "h w d"}[axis]
    key = {0: "c a b", 1: "a c b", 2: "a b c"}[axis]
    sizes = dict(zip("hwdabc", [*window, depth] * 2, strict=True))
    pairs = rearrange(biases, f"({query}) ({key}) n -> d c (h w) (a b) n", **sizes)
    expected = table[flat.relative_position_index]
    assert torch.equal(pairs, expected.expand_as(pairs))


def test_class_rows_of_a_table_are_neither_repeated_nor_resized() -> None:
    table = torch.randn(5 * 5 + 3, 2)
    assert torch.equal(inflate_rel_bias(table, (3, 3), 2)[-3:], table[-3:])
    for mode in ("spline", "bicubic"):
        assert torch.equal(resize_rel_bias(table, (3, 3), (4, 5), mode)[-3:], table[-3:])
    assert (
        inflate_rel_bias(table, (3, 3), 2).shape
        == RelativePositionBias((3, 3, 2), 2).relative_position_bias_table.shape
    )


@given(old=st.tuples(*[st.integers(1, 5)] * 2), new=st.tuples(*[st.integers(1, 9)] * 2))
def test_a_resized_table_keeps_its_centre_and_its_constants(old: tuple[int, int], new: tuple[int, int]) -> None:
    rows = [(2 * old[0] - 1) * (2 * old[1] - 1), (2 * new[0] - 1) * (2 * new[1] - 1)]
    table = torch.randn(rows[0], 2)
    resized = resize_rel_bias(table, old, new)
    assert resized.shape == (rows[1], 2)
    torch.testing.assert_close(resized[rows[1] // 2], table[rows[0] // 2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(resize_rel_bias(torch.ones(rows[0], 1), old, new), torch.ones(rows[1], 1))


@pytest.mark.parametrize(("mode", "axis", "kind"), itertools.product(MODES, (0, 2), (PatchMerging, PatchMergingV2)))
@torch.no_grad()
def test_inflated_patch_merging_gives_the_2d_result_in_every_plane(mode: Any, axis: int, kind: type) -> None:
    flat, deep = PatchMergingV2(3, spatial_dims=2), kind(3, spatial_dims=3)
    for parameter in flat.parameters():
        parameter.normal_()
    order = "merging" if kind is PatchMerging else "mergingv2"
    deep.norm.weight.copy_(inflate_merging_norm(flat.norm.weight, order, axis))
    deep.norm.bias.copy_(inflate_merging_norm(flat.norm.bias, order, axis))
    deep.reduction.weight.copy_(inflate_merging_reduction(flat.reduction.weight, order, mode, axis))
    image = torch.randn(1, 4, 6, 3)
    volume = image.unsqueeze(1 + axis).repeat_interleave(4, dim=1 + axis)
    expected = flat(image).unsqueeze(1 + axis)
    found = deep(volume)
    torch.testing.assert_close(found, expected.expand_as(found), atol=1e-5, rtol=1e-5)


def test_wrong_choices_are_sentences() -> None:
    with pytest.raises(ValueError, match="mode must be center or average, got 'middle'"):
        inflate_kernel(torch.zeros(1, 1, 2, 2), 2, "middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        inflate_kernel(torch.zeros(1, 1, 2, 2), 0)
    with pytest.raises(ValueError, match="table_mode must be spline or bicubic"):
        resize_rel_bias(torch.zeros(9, 1), (2, 2), (3, 3), "linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has 10 rows, expected 9 \(or 3 more with a class token\)"):
        inflate_rel_bias(torch.zeros(10, 1), (2, 2), 2)
    with pytest.raises(ValueError, match="merging must be merging or mergingv2"):
        inflate_merging_norm(torch.zeros(8), "v2")  # type: ignore[arg-type]
