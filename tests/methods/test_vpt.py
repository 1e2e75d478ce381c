"""VPT: prompt tokens put beside those of the image by hand must give what the method gives, in a ViT and in windows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from monai.networks.blocks import TransformerBlock
from monai.networks.nets.swin_unetr import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from monai_petl import adapt, disabled, load_adapter, merge, save_adapter, summary
from monai_petl.core.deltas import deltas_of
from monai_petl.methods import VPETL, VPT, LastBlocks
from tests.conftest import differing, frozen, state_of
from tests.methods.small_networks import (
    TRANSFORMERS,
    build,
    output,
    segresnet,
    shaken,
    swin_unetr,
    teach,
    trained_names,
    unet,
    unetr,
    vit,
    without_gradient,
)


class WithTokens(nn.Module):
    """A block of a ViT that runs on the image's tokens and on some others; drops those, or hands them on."""

    def __init__(self, block: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        self.block, self.tokens, self.next = block, tokens, None

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens if self.tokens.ndim == 3 else self.tokens.expand(len(x), *self.tokens.shape)
        y = self.block(torch.cat((x, tokens), 1))
        if self.next is not None:
            self.next.tokens = y[:, x.shape[1] :]
        return y[:, : x.shape[1]]


class WindowsWithTokens(nn.Module):
    """Attention in windows to which tokens were added: all attend to all, without position and mask where tokens are."""

    def __init__(self, attention: WindowAttention, tokens: Tensor) -> None:
        super().__init__()
        self.attention, self.tokens = attention, tokens

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        a, n, p = self.attention, x.shape[1], len(self.tokens)
        bias = a.relative_position_bias_table[a.relative_position_index[:n, :n]].permute(2, 0, 1)  # (heads, N, N)
        rows = []
        for window in range(len(x)):
            both = torch.cat((x[window], self.tokens))
            q, k, v = a.qkv(both).chunk(3, -1)
            by_head = []
            for head in range(a.num_heads):
                qh, kh, vh = (t.chunk(a.num_heads, -1)[head] for t in (q, k, v))
                logits = qh @ kh.T / qh.shape[-1] ** 0.5
                added = torch.zeros(n + p, n + p)
                added[:n, :n] = bias[head] if mask is None else bias[head] + mask[window % len(mask)]
                by_head.append((logits + added).softmax(-1) @ vh)
            rows.append(a.proj(torch.cat(by_head, -1))[:n])
        return torch.stack(rows)


def blocks_of(network: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in network.named_modules() if isinstance(m, TransformerBlock | SwinTransformerBlock)]


def tokens_of(network: nn.Module) -> list[Tensor]:
    return [p.detach() for n, p in network.named_parameters() if n.endswith(".tokens")]


def by_hand(backbone: nn.Module, prompted: nn.Module, deep: bool = True) -> nn.Module:
    """The backbone with the tokens of the adapted network concatenated."""
    network = copy.deepcopy(backbone)
    tokens = tokens_of(prompted)
    before = None
    for place, (name, block) in enumerate(blocks_of(network)):
        if isinstance(block, SwinTransformerBlock):
            if deep or place == 0:
                block.attn = WindowsWithTokens(block.attn, block.norm1(tokens[place]))
            continue
        wrapped = WithTokens(block, tokens[place if deep else 0])
        network.set_submodule(name, wrapped)
        if not deep and before is not None:
            before.next = wrapped
        before = wrapped
    return network


# the formula


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_it_equals_tokens_that_are_concatenated_by_hand(name, deep):
    backbone, x = build(name)
    network = adapt(copy.deepcopy(backbone), VPT(3, deep))
    for tokens in tokens_of(network):
        tokens.normal_()
    expected = output(by_hand(backbone, network, deep), x)
    assert torch.allclose(output(network, x), expected, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(output(backbone, x), expected, atol=1e-3 * expected.abs().max().item())


@torch.no_grad()
def test_windows_of_a_volume_that_are_shifted_cut_and_padded():
    backbone = shaken(swin_unetr(3, window_size=(3, 4, 3))).eval().swinViT
    x = torch.randn(1, 1, 32, 36, 40)
    network = adapt(copy.deepcopy(backbone), VPT(2))
    for tokens in tokens_of(network):
        tokens.normal_()
    masks: list[bool] = []
    for module in network.modules():
        if isinstance(module, WindowAttention):
            module.register_forward_pre_hook(lambda m, i, kw: masks.append(kw["mask"] is not None), with_kwargs=True)
    for found, expected in zip(network(x), by_hand(backbone, network)(x), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert True in masks
    assert False in masks


# counts, the start and training


@pytest.mark.parametrize(
    ("make", "method", "count"),
    [
        (vit, VPT(5), 2 * 5 * 24),
        (vit, VPT(5, deep=False), 5 * 24),
        (unetr, VPT(5), 12 * 5 * 24),
        (swin_unetr, VPT(5), 2 * 5 * (12 + 24 + 48 + 96)),
        (swin_unetr, VPT(5, deep=False), 5 * 12),
    ],
)
def test_the_count(make, method, count):
    assert summary(adapt(make(), method)).trainable == count


def test_tokens_start_within_the_published_bound():
    tokens = torch.cat([t.flatten() for t in tokens_of(adapt(vit(hidden_size=96), VPT(50)))])
    bound = (3 / 96) ** 0.5
    assert 0.99 * bound < tokens.abs().max() <= bound
    assert abs(tokens.mean()) < 0.05 * bound


@pytest.mark.parametrize("method", [VPT(3), VPT(3, deep=False), VPT(3, dropout=0.3)], ids=str)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_only_tokens_train_and_attention_sees_them_from_the_start(name, method):
    backbone, x = build(name)
    network = adapt(copy.deepcopy(backbone), method)
    with frozen(backbone, network):
        assert not torch.allclose(output(network, x), output(backbone, x))
        with disabled(network):
            assert torch.equal(output(network, x), output(backbone, x))
    before = state_of(network)
    trains = trained_names(network)
    assert all(n.endswith(".tokens") for n in trains)
    teach(network, x)
    assert not without_gradient(network)
    assert differing(before, state_of(network)) == trains


def test_dropout_of_the_tokens_acts_in_training_only():
    network, x = build("SwinUNETR")
    adapt(network, VPT(3, dropout=0.5)).train()
    assert not torch.equal(output(network, x), output(network, x))
    network.eval()
    assert torch.equal(output(network, x), output(network, x))


def test_dropout_of_attention_that_trains_acts_beside_tokens():
    network = swin_unetr(attn_drop_rate=0.5)
    x = torch.randn(1, 1, 64, 64)
    adapt(network, [VPT(3), LastBlocks()]).train()
    assert not torch.equal(output(network, x), output(network, x))


# beside others


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_two_adapters_add_their_tokens(name, deep, tmp_path):
    backbone, x = build(name)
    first = adapt(copy.deepcopy(backbone), VPT(3, deep), name="first")
    both = adapt(copy.deepcopy(first), VPT(2, deep), name="second")
    one = adapt(copy.deepcopy(backbone), VPT(5, deep))
    with torch.no_grad():
        pairs = zip(tokens_of(both)[::2], tokens_of(both)[1::2], strict=True)
        for own, pair in zip(tokens_of(one), pairs, strict=True):
            own.copy_(torch.cat(pair))
    with frozen(first, both, one):
        assert torch.allclose(output(both, x), output(one, x), atol=1e-5)
        with disabled(both, "second"):
            assert torch.equal(output(both, x), output(first, x))
    path = save_adapter(first, tmp_path / "first.safetensors")
    again = load_adapter(copy.deepcopy(backbone), path).eval()
    with frozen(first, again):
        assert torch.equal(output(again, x), output(first, x))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_tokens_pass_the_projections_that_other_methods_change(name):
    backbone, x = build(name)
    patt = adapt(copy.deepcopy(backbone), VPETL(ffn_bottleneck=None, init="published"))
    both = adapt(copy.deepcopy(patt), VPT(3), name="tokens")
    with frozen(patt, both):
        expected = output(by_hand(patt, both), x)
        assert torch.allclose(output(both, x), expected, atol=1e-5 * expected.abs().max().item())


def test_checkpointing_gives_the_same_gradients():
    plain, x = build("SwinUNETR")
    adapt(plain, VPT(3))
    saving = copy.deepcopy(plain)
    for module in saving.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = True
    for network in (plain, saving):
        output(network, x).square().mean().backward()
    grads = [[p.grad for p in n.parameters() if p.requires_grad] for n in (plain, saving)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_bfloat16_and_tracing(name, deep):
    network, x = build(name)
    adapt(network, VPT(3, deep))
    expected = output(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (output(network, x).float() - expected).abs().max() < 0.1 * expected.abs().max()
    with frozen(network):
        traced = torch.jit.trace(network, x, check_trace=False)
        assert torch.allclose(output(traced, x), output(network, x), atol=1e-5)


def test_an_interrupted_pass_leaves_nothing_behind():
    network, x = build("ViT")
    adapt(network, VPT(3, deep=False))
    expected = output(network, x)
    hook = network.blocks[1].register_forward_pre_hook(lambda m, i: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        output(network, x)
    hook.remove()
    assert torch.equal(output(network, x), expected)
    assert not deltas_of(network)[0][1].stream


# refusals


def test_it_cannot_be_merged():
    with pytest.raises(TypeError, match="cannot be merged"):
        merge(adapt(vit(), VPT()))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (VPT(0), "num_tokens must be a whole number of at least 1, got 0"),
        (VPT(2.5), "num_tokens must be a whole number of at least 1, got 2.5"),
        (VPT(dropout=-0.1), "dropout must be at least 0 and below 1, got -0.1"),
    ],
    ids=str,
)
def test_bad_values_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        adapt(vit(), method)


@pytest.mark.parametrize("make", [segresnet, unet])
def test_convolutional_networks_are_refused(make):
    with pytest.raises(TypeError, match="has no transformer blocks"):
        adapt(make(), VPT())


@pytest.mark.parametrize("what", ["relative", "causal"])
def test_attention_in_which_tokens_have_no_place_is_refused(what):
    network = vit()
    if what == "relative":
        network.blocks[1].attn.rel_positional_embedding = nn.Identity()
    else:
        network.blocks[1].attn.causal = True
    text = str(network)
    with pytest.raises(TypeError, match=r"VPT cannot add tokens at blocks\.1"):
        adapt(network, VPT())
    assert str(network) == text
