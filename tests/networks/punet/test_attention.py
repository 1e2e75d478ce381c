"""Window attention with prompt tokens, against a slow reference written out voxel by voxel."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from monai_petl.core.summary import saved_activation_bytes
from monai_petl.networks.punet.attention import AttentionPrompt, PromptAttention, WindowAttention
from monai_petl.networks.punet.windows import PARTITIONS, WindowPlan

CPU = torch.device("cpu")
CHANNELS, HEADS, WINDOW = 8, 2, (4, 4, 2)


def attention_of(window=WINDOW, **options) -> PromptAttention:
    return PromptAttention(CHANNELS, HEADS, window, bias_width=4, **options)


def prompt_of(batch: int, tokens: int = 3) -> AttentionPrompt:
    shape = (batch, HEADS, tokens, CHANNELS // HEADS)
    return AttentionPrompt(torch.randn(shape), torch.randn(shape), torch.randn(batch, HEADS, tokens))


def windows_by_hand(size, window, partition: str, shifted: bool) -> list[list[tuple]]:
    """Windows as lists of (voxel or None, region, position in the window), from the definition.

    The last window of an axis is filled up with padding. A shift moves the volume towards the front, so that the front
    comes round to the end, where it is a region of its own.
    """
    window = [min(w, n) for w, n in zip(window, size, strict=True)]
    shift = [w // 2 if n > w and shifted and partition == "block" else 0 for w, n in zip(window, size, strict=True)]
    counts = [math.ceil(n / w) for n, w in zip(size, window, strict=True)]
    padded = [c * w for c, w in zip(counts, window, strict=True)]
    found = []
    for index in product(*map(range, counts)):
        rows = []
        for position in product(*map(range, window)):
            if partition == "grid":
                place = [p * c + i for p, c, i in zip(position, counts, index, strict=True)]
            else:
                place = [i * w + p for p, w, i in zip(position, window, index, strict=True)]
            voxel = tuple((a + s) % n for a, s, n in zip(place, shift, padded, strict=True))
            region = tuple(a + s >= n for a, s, n in zip(place, shift, padded, strict=True))
            real = all(v < n for v, n in zip(voxel, size, strict=True))
            rows.append((voxel if real else None, region, position))
        found.append(rows)
    return found


def slow_attend(
    attention: PromptAttention,
    normed: Tensor,
    size,
    window,
    partition: str,
    shifted: bool,
    prompt: AttentionPrompt | None,
) -> tuple[Tensor, Tensor]:
    """Attended values (B, H, W, D, C), and the weights of the tokens (B, heads, H, W, D, T)."""
    width = CHANNELS // HEADS
    query, key, value = attention.qkv(normed).chunk(3, -1)
    tokens = 0 if prompt is None else prompt.key.shape[2]
    out, token_weights = torch.zeros_like(normed), torch.zeros(len(normed), HEADS, *size, tokens)
    tables = [(getattr(attention, f"relative_table_{a}"), getattr(attention, f"relative_head_{a}")) for a in "hwd"]
    for rows in windows_by_hand(size, window, partition, shifted):
        for b, head, (voxel, region, position) in product(range(len(normed)), range(HEADS), rows):
            if voxel is None:
                continue
            part = slice(head * width, (head + 1) * width)
            q = query[(b, *voxel)][part]
            scores, values = [], []
            for t in range(tokens):
                scores.append(q @ prompt.key[b, head, t] * width**-0.5 + prompt.bias[b, head, t])
                values.append(prompt.value[b, head, t])
            for other, other_region, other_position in rows:
                if other is None or other_region != region:
                    continue
                bias = sum(
                    heads[head] @ table[there - here + configured - 1] * table.shape[1] ** -0.5 / 3
                    for (table, heads), here, there, configured in zip(
                        tables, position, other_position, window, strict=True
                    )
                )
                scores.append(q @ key[(b, *other)][part] * width**-0.5 + bias)
                values.append(value[(b, *other)][part])
            weights = torch.stack(scores).softmax(0)
            out[(b, *voxel)][part] = weights @ torch.stack(values)
            token_weights[(b, head, *voxel)] = weights[:tokens]
    return out, token_weights


CASES = [
    pytest.param((4, 4, 2), id="one-window"),
    pytest.param((8, 4, 2), id="two-windows"),
    pytest.param((3, 6, 1), id="smaller-than-window-and-padded"),
    pytest.param((5, 7, 3), id="padded-on-every-axis"),
]


@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("prompted", [True, False], ids=["prompted", "content-only"])
@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "plain"])
@pytest.mark.parametrize("partition", PARTITIONS)
@torch.no_grad()
def test_attention_equals_the_slow_reference(partition, shifted, prompted, size):
    attention = attention_of()
    batch = 2 if prompted and size[0] == 3 else 1
    normed, prompt = torch.randn(batch, *size, CHANNELS), prompt_of(batch) if prompted else None
    plan = WindowPlan(size, WINDOW, partition, shifted, CPU)
    expected, _ = slow_attend(attention, normed, size, WINDOW, partition, shifted, prompt)
    torch.testing.assert_close(attention.attend(normed, plan, prompt), expected, atol=3e-4, rtol=1e-4)


def test_gradients_equal_those_of_the_slow_reference():
    size, attention = (3, 5, 1), attention_of((4, 4, 1))
    normed, prompt = torch.randn(1, *size, CHANNELS, requires_grad=True), prompt_of(1)
    prompt.key.requires_grad_(), prompt.value.requires_grad_(), prompt.bias.requires_grad_()
    plan = WindowPlan(size, (4, 4, 1), "block", True, CPU)
    inputs = [normed, prompt.key, prompt.value, prompt.bias, attention.qkv.weight, attention.relative_table_w]
    probe = torch.randn(1, *size, CHANNELS)
    found = torch.autograd.grad((attention.attend(normed, plan, prompt) * probe).sum(), inputs)
    slow, _ = slow_attend(attention, normed, size, (4, 4, 1), "block", True, prompt)
    expected = torch.autograd.grad((slow * probe).sum(), inputs)
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("partition", "size"), [("block", (6, 5, 1)), ("block", (5, 6, 3)), ("grid", (6, 5, 1)), ("grid", (5, 7, 3))]
)
@torch.no_grad()
def test_a_voxel_of_another_region_or_window_has_no_influence(partition, size):
    attention = attention_of()
    plan = WindowPlan(size, WINDOW, partition, True, CPU)
    normed = torch.randn(1, *size, CHANNELS)
    before = attention.attend(normed, plan, None)
    reach: dict[tuple, set] = {}
    for rows in windows_by_hand(size, WINDOW, partition, True):
        for voxel, region, _ in rows:
            reach[voxel] = {other for other, other_region, _ in rows if other_region == region}
    for changed in [(0, 0, 0), tuple(n - 1 for n in size), tuple(n // 2 for n in size)]:
        other = normed.clone()
        other[(0, *changed)] += 10
        moved = (attention.attend(other, plan, None) - before).abs().amax(-1)[0]
        for voxel in product(*map(range, size)):
            if changed not in reach[voxel]:
                assert moved[voxel] < 1e-6
        assert moved[changed] > 1e-3


@torch.no_grad()
def test_content_of_the_padding_has_no_influence():
    # a window of padded zeros projects to zero keys, which would take part in an unmasked softmax
    attention, size = attention_of((4, 1, 1)), (5, 1, 1)
    plan = WindowPlan(size, (4, 1, 1), "block", False, CPU)
    normed = torch.randn(1, *size, CHANNELS)
    alone = attention.qkv(normed).chunk(3, -1)[2][0, 4]  # the last voxel shares its window with padding only
    torch.testing.assert_close(attention.attend(normed, plan, None)[0, 4], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("partition", PARTITIONS)
@torch.no_grad()
def test_token_bias_is_the_same_for_every_query_voxel(partition):
    attention, size = attention_of(), (5, 7, 1)
    plan = WindowPlan(size, WINDOW, partition, True, CPU)
    prompt = prompt_of(1)
    prompt.bias[:, 0, 1] = 60.0  # head 0 sees nothing but token 1
    out = attention.attend(torch.randn(1, *size, CHANNELS), plan, prompt)
    expected = prompt.value[0, 0, 1].expand(*size, -1)
    torch.testing.assert_close(out[0, ..., : CHANNELS // HEADS], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_score_of_a_token_moves_by_its_bias_at_every_voxel():
    attention, size = attention_of(), (5, 3, 1)
    plan = WindowPlan(size, WINDOW, "block", True, CPU)
    normed = torch.randn(1, *size, CHANNELS)
    prompt = prompt_of(1, tokens=1)
    moved = AttentionPrompt(prompt.key, prompt.value, prompt.bias + 0.7)
    (_, before), (_, after) = (slow_attend(attention, normed, size, WINDOW, "block", True, p) for p in (prompt, moved))
    change = torch.logit(after) - torch.logit(before)
    torch.testing.assert_close(change, torch.full_like(change, 0.7), atol=1e-4, rtol=1e-4)
    expected, _ = slow_attend(attention, normed, size, WINDOW, "block", True, moved)
    torch.testing.assert_close(attention.attend(normed, plan, moved), expected, atol=3e-4, rtol=1e-4)


@torch.no_grad()
def test_the_order_of_tokens_does_not_matter():
    attention, size = attention_of(), (5, 7, 1)
    plan = WindowPlan(size, WINDOW, "grid", False, CPU)
    normed, prompt, order = torch.randn(2, *size, CHANNELS), prompt_of(2, tokens=5), torch.randperm(5)
    permuted = AttentionPrompt(prompt.key[:, :, order], prompt.value[:, :, order], prompt.bias[..., order])
    torch.testing.assert_close(
        attention.attend(normed, plan, permuted), attention.attend(normed, plan, prompt), atol=1e-6, rtol=1e-5
    )


@torch.no_grad()
def test_attention_without_prompts_equals_attention_with_zero_tokens():
    attention, size = attention_of(), (5, 7, 2)
    plan = WindowPlan(size, WINDOW, "block", True, CPU)
    x = torch.randn(2, *size, CHANNELS)
    torch.testing.assert_close(attention(x, plan, prompt_of(2, tokens=0)), attention(x, plan, None))


@torch.no_grad()
def test_keys_and_values_of_tokens_are_projections_of_the_normalised_tokens():
    attention = attention_of()
    tokens, bias = torch.randn(3, 5, CHANNELS), torch.randn(3, HEADS, 5)
    prompt = attention.project_tokens(tokens, bias)
    _, key, value = attention.qkv(attention.norm(tokens)).chunk(3, -1)
    for found, expected in ((prompt.key, key), (prompt.value, value)):
        torch.testing.assert_close(found.transpose(1, 2).flatten(2), expected)
    assert torch.equal(prompt.bias, bias)
    rows = torch.tensor([2, 0, 2])
    assert torch.equal(prompt.select(rows).key, prompt.key[rows])


@pytest.mark.parametrize("window", [(4, 4, 2), (3, 4, 1), (1, 1, 1)])
@torch.no_grad()
def test_relative_bias_is_a_third_of_the_sum_over_the_axes(window):
    attention = attention_of()
    found = attention.relative_bias(window)
    positions = list(product(*map(range, window)))
    assert found.shape == (HEADS, len(positions), len(positions))
    for (n, query), (m, key) in product(enumerate(positions), enumerate(positions)):
        expected = torch.zeros(HEADS)
        for axis, name in enumerate("hwd"):
            table = getattr(attention, f"relative_table_{name}")
            head = getattr(attention, f"relative_head_{name}")
            expected += head @ table[key[axis] - query[axis] + WINDOW[axis] - 1] / 3 / math.sqrt(table.shape[1])
        torch.testing.assert_close(found[:, n, m], expected)


def test_a_sub_block_is_two_residual_steps():
    attention, plan = attention_of(), WindowPlan((4, 5, 1), WINDOW, "grid", False, CPU)
    x = torch.randn(2, 4, 5, 1, CHANNELS)
    y = x + attention.out(attention.attend(attention.norm(x), plan, None))
    torch.testing.assert_close(attention(x, plan), y + attention.mlp(attention.mlp_norm(y)))
    for layer in (attention.out, attention.mlp):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert torch.equal(attention(x, plan), x)


@pytest.mark.parametrize(("ratio", "values"), [(1.0, 8 * 8 + 8), (4.0, 8 * 32 + 32 + 32 * 8 + 8)])
def test_the_perceptron_has_the_ratio_that_was_asked_for(ratio, values):
    assert sum(p.numel() for p in attention_of(mlp_ratio=ratio).mlp.parameters()) == values


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"num_heads=3 must divide .* channels=8"):
        PromptAttention(8, 3, WINDOW)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("size", [(8, 8, 1), (5, 9, 3), (1, 1, 1)])
def test_a_block_keeps_the_shape_and_attends_twice(partition, size):
    block = WindowAttention(CHANNELS, HEADS, WINDOW, partition=partition, bias_width=4)
    x = torch.randn(2, CHANNELS, *size)
    out = block(x)
    assert out.shape == x.shape
    plain, shifted = block.plans(size, CPU)
    expected = block.attn1(block.attn0(x.permute(0, 2, 3, 4, 1), plain), shifted)
    torch.testing.assert_close(out, expected.permute(0, 4, 1, 2, 3))


def test_the_second_sub_block_of_contiguous_windows_is_shifted_by_half_a_window():
    block = WindowAttention(CHANNELS, HEADS, (4, 4, 1), partition="block", bias_width=4)
    plain, shifted = block.plans((8, 8, 1), CPU)
    assert plain.shift == [0, 0, 0]
    assert shifted.shift == [2, 2, 0]
    assert block.plans((8, 8, 1), CPU)[1] is shifted


def test_a_frozen_sub_block_keeps_no_score_matrix_for_backward():
    attention, size = attention_of((8, 8, 1)).requires_grad_(False), (64, 64, 1)
    plan = WindowPlan(size, (8, 8, 1), "block", True, CPU)
    normed, prompt = torch.randn(1, *size, CHANNELS), prompt_of(1)
    prompt.key.requires_grad_()
    scores = 4 * plan.num_windows * HEADS * plan.window_voxels * (3 + plan.window_voxels)
    kept = saved_activation_bytes(attention, lambda: attention.attend(normed, plan, prompt))
    assert kept < scores, (kept, scores)
