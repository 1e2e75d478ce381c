"""Prompt sets and the bank that holds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monai_petl.networks.punet.prompts import PROMPT_DEPTHS, PromptBank, PromptSet, xavier_parameter

DEFAULT_BLOCKS = {
    **dict(zip(("enc0", "enc1", "enc2", "enc3", "enc4"), (32, 64, 128, 256, 384), strict=True)),
    **dict(zip(("dec0", "dec1", "dec2", "dec3"), (256, 128, 64, 32), strict=True)),
}
BLOCKS = {"enc0": 4, "enc1": 6, "dec0": 4}


def bank_of(*names: str, **options) -> PromptBank:
    bank = PromptBank(BLOCKS, **{"tokens": 3, "num_heads": 2, "bias_width": 5, "embedding_channels": 4, **options})
    for name in names:
        bank.add_class(name)
    return bank


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("tokens", "values"), [(1, 7_904), (4, 17_792), (8, 30_976), (16, 57_344), (32, 110_080), (64, 215_552)]
)
def test_a_class_has_the_published_number_of_values(tokens, values):
    prompts = PromptSet(DEFAULT_BLOCKS, tokens=tokens)
    assert count(prompts) == values == 3_296 * tokens + 4_608
    assert sum(t.numel() for t in prompts.state_dict().values()) == values


@pytest.mark.parametrize(
    ("depth", "values"), [("full", 57_344), ("encoder", 35_840), ("decoder", 22_016), ("start", 3_072), ("end", 512)]
)
def test_prompting_depths_have_the_published_sizes(depth, values):
    assert count(PromptSet(DEFAULT_BLOCKS, depth=depth)) == values


def test_own_background_tokens_are_512_values_more():
    assert count(PromptSet(DEFAULT_BLOCKS, own_background=True)) == 57_344 + 512


@given(
    tokens=st.integers(1, 6),
    heads=st.sampled_from((1, 2, 4)),
    width=st.integers(1, 5),
    depth=st.sampled_from(PROMPT_DEPTHS),
    own_background=st.booleans(),
)
def test_sizes_follow_the_formula(tokens, heads, width, depth, own_background):
    prompts = PromptSet(
        BLOCKS,
        tokens=tokens,
        num_heads=heads,
        bias_width=width,
        embedding_channels=4,
        depth=depth,
        own_background=own_background,
    )
    deep = sum(2 * tokens * BLOCKS[b] + 2 * tokens * width + 2 * heads * width for b in prompts.blocks)
    assert count(prompts) == deep + tokens * 4 * (1 + own_background)


@given(shape=st.lists(st.integers(1, 8), min_size=2, max_size=4))
def test_initial_values_are_xavier_uniform_over_the_last_two_axes(shape):
    values = xavier_parameter(*shape).detach()
    assert values.abs().max() <= (6 / (shape[-2] + shape[-1])) ** 0.5


def test_token_bias_is_the_scaled_product_of_head_vectors_and_table_rows():
    prompts = bank_of("a")["a"]
    bias = prompts.token_bias()
    assert list(bias) == list(BLOCKS)
    for row, block in enumerate(BLOCKS):
        assert bias[block].shape == (2, 2, 3)
        for sub, head, token in ((0, 1, 2), (1, 0, 0)):
            expected = prompts.bias_heads[row, sub, head] @ prompts.bias_tables[row, sub, token] * 5**-0.5
            torch.testing.assert_close(bias[block][sub, head, token], expected)


def test_classes_are_known_by_name_in_the_order_of_adding():
    bank = bank_of("spleen", "liver", "left kidney")
    assert bank.names == ["spleen", "liver", "left kidney"]
    bank.remove_class("liver")
    bank.add_class("liver")
    assert bank.names == ["spleen", "left kidney", "liver"]
    assert "classes.left kidney.head_tokens" in bank.state_dict()


def test_more_than_ten_classes_can_be_added():
    names = [f"organ{i}" for i in range(25)]
    bank = bank_of(*names)
    assert bank.names == names
    heads = bank.stack(names).head_tokens
    assert all(torch.equal(heads[i, 1], bank[name].head_tokens) for i, name in enumerate(names))


@pytest.mark.parametrize("name", ["", "a.b", "background", "keys", "training", "parameters"])
def test_names_that_cannot_be_used_are_refused_with_a_sentence(name):
    with pytest.raises(ValueError, match="cannot be used as a class name"):
        bank_of("a").add_class(name)


@pytest.mark.parametrize(
    ("action", "error", "says"),
    [
        (lambda bank: bank.add_class("a"), ValueError, "'a' is there already"),
        (lambda bank: bank.add_class("b", init="zeros"), ValueError, "init must be .*'zeros'"),
        (lambda bank: bank.add_class("b", init="copy:c"), KeyError, "unknown class 'c'.* a"),
        (lambda bank: bank.add_class("b", depth="half"), ValueError, "prompt depth must be one of .*'half'"),
        (lambda bank: bank.remove_class("b"), KeyError, "unknown class 'b'; this network has prompts for: a"),
        (lambda bank: bank["b"], KeyError, "unknown class 'b'"),
        (lambda bank: bank.stack(["a", "b"]), KeyError, "unknown class 'b'"),
        (lambda bank: bank.trainable(["b"]), KeyError, "unknown class 'b'"),
    ],
)
def test_mistakes_are_answered_with_a_sentence_and_change_nothing(action, error, says):
    bank = bank_of("a")
    with pytest.raises(error, match=says):
        action(bank)
    assert bank.names == ["a"]
    assert all(p.requires_grad for p in bank.parameters())


def test_a_class_needs_a_token():
    with pytest.raises(ValueError, match="at least one token, got tokens=0"):
        PromptSet(BLOCKS, tokens=0)


def test_adding_and_removing_a_class_leaves_the_others_bit_identical():
    bank = bank_of("a", "b")
    before = {n: t.clone() for n, t in bank.state_dict().items()}
    bank.add_class("c", init="mean")
    bank.remove_class("c")
    assert all(torch.equal(t, before[n]) for n, t in bank.state_dict().items())
    assert before.keys() == bank.state_dict().keys()


def test_a_class_can_start_as_a_copy_that_is_independent():
    bank = bank_of("a")
    bank.add_class("b", init="copy:a")
    for name, tensor in bank["a"].state_dict().items():
        assert torch.equal(bank["b"].state_dict()[name], tensor)
    bank["b"].head_tokens.data += 1
    assert not torch.equal(bank["a"].head_tokens, bank["b"].head_tokens)


def test_a_class_can_start_as_the_mean_of_the_others():
    bank = bank_of("a", "b")
    bank.add_class("c", init="mean")
    for name, tensor in bank["c"].state_dict().items():
        mean = (bank["a"].state_dict()[name] + bank["b"].state_dict()[name]) / 2
        torch.testing.assert_close(tensor, mean)


def test_the_mean_of_classes_of_other_depths_uses_what_they_have():
    bank = bank_of("a")
    bank.add_class("b", depth="decoder")
    bank.add_class("c", init="mean")
    bank.add_class("d", init="mean", depth="start")
    a, b, c = bank["a"], bank["b"], bank["c"]
    torch.testing.assert_close(c.tokens["dec0"], (a.tokens["dec0"] + b.tokens["dec0"]) / 2)
    torch.testing.assert_close(c.bias_tables[2], (a.bias_tables[2] + b.bias_tables[0]) / 2)
    assert torch.equal(c.tokens["enc0"], a.tokens["enc0"])
    torch.testing.assert_close(bank["d"].tokens["enc0"], (a.tokens["enc0"] + c.tokens["enc0"]) / 2)


def test_the_mean_of_no_class_is_a_random_start():
    assert bank_of().add_class("a", init="mean").head_tokens.abs().sum() > 0


def test_exactly_the_named_classes_train():
    bank = bank_of("a", "b", "c")
    bank.trainable(["b", "c"])
    bank.freeze("c")
    training = {n for n, p in bank.named_parameters() if p.requires_grad}
    assert training
    assert all(n.startswith("classes.b.") for n in training)


def test_a_new_class_has_the_type_and_mode_of_the_bank():
    bank = bank_of().double().eval()
    prompts = bank.add_class("a")
    assert prompts.head_tokens.dtype == torch.float64
    assert not prompts.training


def test_own_background_tokens_start_as_the_shared_ones_and_take_their_place():
    bank = bank_of("a")
    bank.add_class("b", own_background=True)
    assert torch.equal(bank["b"].background_tokens, bank.background)
    bank["b"].background_tokens.data += 1
    heads = bank.stack(["a", "b"]).head_tokens
    assert torch.equal(heads[0, 0], bank.background)
    assert torch.equal(heads[1, 0], bank["b"].background_tokens)


def test_stacking_keeps_the_order_of_the_names():
    bank = bank_of("a", "b", "c")
    stacked = bank.stack(["c", "a"])
    for row, name in enumerate(("c", "a")):
        for block in BLOCKS:
            assert torch.equal(stacked.tokens[block][row], bank[name].tokens[block])
            assert torch.equal(stacked.token_bias[block][row], bank[name].token_bias()[block])
        assert torch.equal(stacked.head_tokens[row, 1], bank[name].head_tokens)


def test_tokens_that_a_class_has_not_got_cannot_be_seen():
    bank = bank_of("a")
    bank.add_class("b", depth="decoder")
    stacked = bank.stack(["b", "a"])
    assert torch.exp(stacked.token_bias["enc0"][0]).max() == 0
    assert torch.equal(stacked.token_bias["enc0"][1], bank["a"].token_bias()["enc0"])
    assert set(bank.stack(["b"]).tokens) == {"dec0"}


def test_joining_puts_the_tokens_of_all_classes_into_one_prompt():
    bank = bank_of("a", "b")
    stacked = bank.stack(["a", "b"])
    joined = stacked.joined()
    for block, width in BLOCKS.items():
        assert joined.tokens[block].shape == (1, 2, 6, width)
        assert torch.equal(joined.tokens[block][0, :, :3], bank["a"].tokens[block])
        assert torch.equal(joined.tokens[block][0, :, 3:], bank["b"].tokens[block])
        assert torch.equal(joined.token_bias[block][0, ..., 3:], bank["b"].token_bias()[block])
    assert torch.equal(joined.head_tokens[0, -2], bank["a"].head_tokens)
    assert torch.equal(joined.head_tokens[0, -1], bank["b"].head_tokens)


def test_dropout_on_prompts_acts_in_training_and_not_in_evaluation():
    bank = bank_of("a", dropout=0.5)
    trained = [bank.stack(["a"]).tokens["enc0"] for _ in range(2)]
    assert not torch.equal(*trained)
    assert all((t == 0).any() for t in trained)
    bank.eval()
    assert torch.equal(bank.stack(["a"]).tokens["enc0"][0], bank["a"].tokens["enc0"])
