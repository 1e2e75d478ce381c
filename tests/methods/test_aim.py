"""AIM on 2D transformers: the formula of a block, who trains, what starts as the identity, and how many slices there are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.blocks.selfattention import SABlock
from monai.networks.layers import DropPath
from monai.networks.nets import UNETR, SwinUNETR, UNet, ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import monai_petl as mp
from monai_petl.core.deltas import deltas_of
from monai_petl.methods import AIM, LoRA
from monai_petl.methods.parts.aim_deltas import JointAdapter, SliceEmbedding, SpatialAdapter, TemporalStep
from monai_petl.networks import AIMSwin, AIMViT, ViTSegmenter, slices_of
from monai_petl.networks.vit.attention_bias import add_attention_bias
from monai_petl.networks.vit.slices import Slices, as_slices
from tests.conftest import differing, frozen, state_of, train
from tests.methods.small_networks import shaken, trained_names

WIDTH, HEADS, SLICES, BATCH = 24, 3, 3, 2


def vit(**options: Any) -> ViT:
    settings = {"hidden_size": WIDTH, "mlp_dim": 40, "num_layers": 3, "num_heads": HEADS, "classification": True}
    network = ViT(1, (8, 12), (4, 4), spatial_dims=2, qkv_bias=True, **{**settings, **options})
    if hasattr(network, "classification_head"):
        del network.classification_head
    return shaken(network).eval()


def swin(**options: Any) -> SwinTransformer:
    """Stages of 2, 1, 2 and 1 blocks."""
    settings = {"depths": (2, 1, 2, 1), "num_heads": (2, 2, 4, 4), "spatial_dims": 2}
    return shaken(SwinTransformer(1, 8, (3, 3), (2, 2), **{**settings, **options})).eval()


def volumes(count: int = SLICES, batch: int = BATCH, size: tuple[int, int] = (8, 12)) -> Tensor:
    return torch.randn(batch, 1, *size, count)


def adapted(transformer: Any = None, **options: Any) -> Any:
    """An AIM network that takes volumes."""
    transformer = vit() if transformer is None else transformer
    network = AIMViT(transformer) if isinstance(transformer, ViT) else AIMSwin(transformer)
    return mp.adapt(network, AIM(**{"num_slices": SLICES, **options})).eval()


@torch.no_grad()
def stir(network: Any, *kinds: type[nn.Module], std: float = 0.3) -> Any:
    """Random values in the deltas of these kinds, by default in all but the embedding of slices."""
    for _, delta in deltas_of(network):
        if isinstance(delta, kinds or (TemporalStep, SpatialAdapter, JointAdapter)):
            for parameter in delta.parameters():
                parameter.normal_(0, std)
    return network


def delta_of(network: nn.Module, kind: type[nn.Module], number: int = 0) -> Any:
    return [delta for _, delta in deltas_of(network) if isinstance(delta, kind)][number]


def maps(network: nn.Module, volume: Tensor) -> Tensor:
    """Final features with volumes and slices first: (B, D, ...)."""
    y = network(volume)
    if isinstance(network, AIMViT):
        return y[0].unflatten(0, (len(volume), -1))
    return y[-1].permute(0, 4, 1, 2, 3)


TRANSFORMERS: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    "ViT": (vit, (8, 12)),
    "ViT without class token": (lambda: vit(classification=False), (8, 12)),
    "Swin": (swin, (20, 16)),
}


# the formula of a block


def bottleneck(module: Any, x: Tensor) -> Tensor:
    inner = x @ module.down.weight.T + module.down.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return inner @ module.up.weight.T + module.up.bias


def attention(module: Any, x: Tensor, biases: Tensor | float = 0.0) -> Tensor:
    """Of sequences (B', L, C), with its own weights."""
    fused = getattr(module, "use_combined_linear", True)
    thirds = module.qkv(x).chunk(3, -1) if fused else (module.to_q(x), module.to_k(x), module.to_v(x))
    heads = []
    size = x.shape[-1] // module.num_heads
    for head in range(module.num_heads):
        q, k, v = (third[..., head * size : (head + 1) * size] for third in thirds)
        logits = q @ k.mT / size**0.5 + (biases[head] if isinstance(biases, Tensor) else biases)
        heads.append(logits.softmax(-1) @ v)
    project = module.out_proj if isinstance(module, SABlock) else module.proj
    return project(torch.cat(heads, -1))


def temporal(network: Any, block: Any, x: Tensor) -> Tensor:
    """Step 1 on (B * D, N, C), one place after the other."""
    step = delta_of(block, TemporalStep)
    h = block.norm1(x).unflatten(0, (-1, SLICES))  # (B, D, N, C)
    out = torch.zeros_like(h)
    for place in range(h.shape[2]):
        line = h[:, :, place]
        if step.bottleneck_in is not None:
            line = line + bottleneck(step.bottleneck_in, line)
        out[:, :, place] = bottleneck(step.bottleneck, attention(block.attn, line))
    return x + out.flatten(0, 1)


def spatial(block: Any, x: Tensor) -> Tensor:
    y = attention(block.attn, block.norm1(x))
    return x + y + bottleneck(delta_of(block.attn, SpatialAdapter).bottleneck, y)


def joint(block: Any, x: Tensor, scale: float) -> Tensor:
    z = block.norm2(x)
    mlp = block.mlp.linear2(F.gelu(block.mlp.linear1(z)))
    return x + mlp + scale * bottleneck(delta_of(block.mlp, JointAdapter).bottleneck, z)


def split_projections(network: ViT) -> ViT:
    """The same with separate layers for query, key and value."""
    for block in network.blocks:
        other = SABlock(WIDTH, HEADS, qkv_bias=True, use_combined_linear=False)
        for name, weight, bias in zip("qkv", block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True):
            layer = getattr(other, f"to_{name}")
            layer.weight.data, layer.bias.data = weight.data, bias.data
        other.out_proj = block.attn.out_proj
        block.attn = other.eval()
    return network


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_block_is_the_formula_in_this_order(adapters: int, fused: bool) -> None:
    plain = vit(num_layers=1) if fused else split_projections(vit(num_layers=1))
    network = stir(adapted(plain, num_temporal_adapters=adapters, scale=0.7))
    block = network.blocks[0]
    entering: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    _, (found,) = network(volumes())
    x = entering[0]
    with mp.disabled(network):  # for the layers alone
        for step in (
            lambda x: temporal(network, block, x),
            lambda x: spatial(block, x),
            lambda x: joint(block, x, 0.7),
        ):
            assert not torch.allclose(step(x), x, atol=1e-2)
        wanted = joint(block, spatial(block, temporal(network, block, x)), 0.7)
        swapped = joint(block, temporal(network, block, spatial(block, x)), 0.7)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    assert (found - swapped).abs().max() > 1e-2


def swin_temporal(block: Any, x: Tensor) -> Tensor:
    """Step 1 on (B * D, H, W, C): attention over the slices of each place, with biases by offset."""
    step = delta_of(block, TemporalStep)
    table = step.bias_table
    offsets = [[table[i - j + SLICES - 1] for j in range(SLICES)] for i in range(SLICES)]
    biases = torch.stack([torch.stack(row) for row in offsets]).permute(2, 0, 1)
    h, out = block.norm1(x).unflatten(0, (-1, SLICES)), torch.zeros_like(x).unflatten(0, (-1, SLICES))
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            line = attention(block.attn, h[:, :, row, column], biases)
            out[:, :, row, column] = bottleneck(step.bottleneck, line)
    return x + out.flatten(0, 1)


def swin_spatial(block: Any, x: Tensor) -> Tensor:
    """Step 2: attention in each whole window with relative positions, adapted before the windows are put back."""
    (down, across), attn = block.window_size, block.attn
    y, h = torch.zeros_like(x), block.norm1(x)
    adapter = delta_of(attn, SpatialAdapter).bottleneck
    tokens = down * across
    biases = attn.relative_position_bias_table[attn.relative_position_index[:tokens, :tokens].flatten()]
    biases = biases.view(tokens, tokens, -1).permute(2, 0, 1)
    for top in range(0, x.shape[1], down):
        for left in range(0, x.shape[2], across):
            window = (slice(None), slice(top, top + down), slice(left, left + across))
            z = attention(attn, h[window].flatten(1, 2), biases)
            y[window] = (z + bottleneck(adapter, z)).view(len(x), down, across, -1)
    return x + y


@torch.no_grad()
def test_a_block_of_swin_is_the_formula_in_this_order() -> None:
    network = stir(adapted(swin(), scale=0.7))
    block = network.layers1[0].blocks[0]
    assert not any(block.shift_size)
    x = torch.randn(BATCH * SLICES, 6, 9, 8)
    found = block(x, None)
    with mp.disabled(network):  # for the layers alone
        first = swin_temporal(block, x)
        second = swin_spatial(block, first)
        wanted = joint(block, second, 0.7)
        for after, before in ((first, x), (second, first), (wanted, second)):
            assert not torch.allclose(after, before, atol=1e-2)
        swapped = joint(block, swin_temporal(block, swin_spatial(block, x)), 0.7)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    assert (found - swapped).abs().max() > 1e-2


@torch.no_grad()
def test_attention_over_slices_of_swin_has_biases_by_offset() -> None:
    network = stir(adapted(swin()))
    block = network.layers3[0].blocks[0]
    step = delta_of(block, TemporalStep)
    table = step.bias_table
    assert table.shape == (2 * SLICES - 1, 4)
    biases = torch.stack([torch.stack([table[i - j + SLICES - 1] for j in range(SLICES)]) for i in range(SLICES)])
    x = torch.randn(BATCH * SLICES, 2, 3, 32)
    found = step.around(block, lambda x: x, x)
    lines = block.norm1(x).view(BATCH, SLICES, 6, 32).transpose(1, 2).flatten(0, 1)
    added = bottleneck(step.bottleneck, attention(block.attn, lines, biases.permute(2, 0, 1)))
    wanted = x + added.view(BATCH, 6, SLICES, 32).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    table.zero_()
    assert not torch.allclose(step.around(block, lambda x: x, x), found, atol=1e-3)


@torch.no_grad()
def test_scale_is_linear_and_zero_is_joint_off() -> None:
    plain = vit(num_layers=1)
    outputs = {}
    volume = volumes()
    for scale in (0.0, 0.5, 1.0):
        network = adapted(copy.deepcopy(plain), scale=scale)
        torch.manual_seed(1)
        stir(network)
        outputs[scale] = network(volume)[1][0]
    torch.testing.assert_close(outputs[1.0] - outputs[0.0], 2 * (outputs[0.5] - outputs[0.0]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[1.0], outputs[0.0], atol=1e-2)
    off = adapted(copy.deepcopy(plain), joint=False)
    off.load_state_dict({n: t for n, t in network.state_dict().items() if "joint" not in n})
    torch.testing.assert_close(off(volume)[1][0], outputs[0.0], atol=1e-6, rtol=1e-6)


# the start


@torch.no_grad()
def test_adapters_start_at_zero_or_as_the_identity_exactly() -> None:
    x, y = torch.randn(2, 6, 5, WIDTH)
    assert torch.equal(SpatialAdapter(WIDTH, 6)(x, y), y)
    assert torch.equal(JointAdapter(WIDTH, 6, 0.5, 0.0)(x, y), y)
    assert torch.equal(SliceEmbedding(Slices(), SLICES, True, WIDTH)(x, y), y)
    step = TemporalStep(Slices(), SLICES, True, WIDTH, 6, adapters=2)
    assert torch.equal(step.around(vit().blocks[0], lambda x: x, x), x)
    for part in (step.bottleneck, step.bottleneck_in):
        assert not part(x).any()
        assert 0.01 < part.down.weight.std() < 0.03


@torch.no_grad()
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_network_starts_as_the_2d_network_slice_by_slice(name: str, adapters: int) -> None:
    make, size = TRANSFORMERS[name]
    plain, volume = make(), volumes(size=size)
    network = adapted(copy.deepcopy(plain), num_temporal_adapters=adapters)
    found = maps(network, volume)
    alone = plain(as_slices(volume))
    wanted = alone[-1] if name == "Swin" else alone[0]
    torch.testing.assert_close(found.flatten(0, 1), wanted, atol=1e-6, rtol=0)
    stir(network)
    assert (maps(network, volume) - found).abs().max() > 1e-2


@torch.no_grad()
def test_networks_with_a_2d_transformer_inside_start_as_they_were() -> None:
    unetr = shaken(UNETR(1, 2, (16, 16), 4, 24, 48, 3, spatial_dims=2)).eval()
    swin_unetr = shaken(SwinUNETR(1, 2, feature_size=12, num_heads=(1, 2, 2, 4), spatial_dims=2)).eval()
    for plain, size in ((unetr, 16), (swin_unetr, 64)):
        images = torch.randn(2 * SLICES, 1, size, size)
        network = mp.adapt(copy.deepcopy(plain), AIM(num_slices=SLICES))
        assert type(network) is type(plain)
        with frozen(network, plain):
            torch.testing.assert_close(network(images), plain(images), atol=1e-6, rtol=0)
        before = network(images)
        stir(network)
        other = images.clone()
        other[1] = torch.randn_like(other[1])
        changed = (network(other) - network(images)).abs().amax((1, 2, 3)) > 1e-6
        assert changed.tolist() == [True] * SLICES + [False] * SLICES
        assert not torch.allclose(network(images), before, atol=1e-3)


# who mixes what


@torch.no_grad()
def test_attention_over_slices_mixes_tokens_of_one_place_in_one_volume() -> None:
    network = stir(adapted())
    block, step = network.blocks[0], delta_of(network, TemporalStep)
    x = torch.randn(BATCH * SLICES, 7, WIDTH)
    other = x.clone()
    other[1 * SLICES + 2, 4] = torch.randn(WIDTH)  # b = 1, d = 2, n = 4
    changed = (step.around(block, lambda x: x, other) - step.around(block, lambda x: x, x)).abs().amax(-1) > 1e-6
    wanted = torch.zeros(BATCH, SLICES, 7, dtype=torch.bool)
    wanted[1, :, 4] = True
    assert torch.equal(changed.view(BATCH, SLICES, 7), wanted)


@torch.no_grad()
def test_the_block_itself_mixes_tokens_of_one_slice() -> None:
    network = stir(adapted(), SpatialAdapter, JointAdapter)
    volume = volumes()
    other = volume.clone()
    other[1, :, 0, 0, 2] += 1
    changed = (maps(network, other) - maps(network, volume)).abs().amax(-1) > 1e-6  # (B, D, N)
    wanted = torch.zeros(BATCH, SLICES, 7, dtype=torch.bool)
    wanted[1, 2] = True
    assert torch.equal(changed, wanted)


@torch.no_grad()
def test_order_of_the_slices_matters_by_the_embedding_alone() -> None:
    network, volume = stir(adapted(), TemporalStep), volumes()
    order = [2, 0, 1]
    torch.testing.assert_close(maps(network, volume[..., order]), maps(network, volume)[:, order], atol=1e-5, rtol=1e-5)
    stir(network, SliceEmbedding)
    assert (maps(network, volume[..., order]) - maps(network, volume)[:, order]).abs().max() > 1e-2


@torch.no_grad()
def test_equal_slices_give_equal_outputs_but_for_the_embedding() -> None:
    network, volume = stir(adapted()), volumes(1).expand(-1, -1, -1, -1, SLICES)
    found = maps(network, volume)
    torch.testing.assert_close(found, found[:, :1].expand_as(found), atol=1e-6, rtol=1e-6)
    found = maps(stir(network, SliceEmbedding), volume)
    assert (found - found[:, :1]).abs().max() > 1e-2


@torch.no_grad()
def test_relative_positions_of_the_plane_stay_in_the_plane() -> None:
    plain = vit()
    network = stir(adapted(plain))
    x, block = torch.randn(BATCH * SLICES, 7, WIDTH), network.blocks[0]
    step, before = delta_of(block, TemporalStep), network(volumes())[0]
    without = step.around(block, lambda x: x, x)
    add_attention_bias(network, "table", (2, 3), HEADS)
    for attn in (b.attn for b in network.blocks):
        nn.init.normal_(attn.rel_positional_embedding.relative_position_bias_table)
    assert torch.equal(step.around(block, lambda x: x, x), without)
    assert network(volumes())[0].shape == before.shape


def test_attention_has_one_set_of_weights_for_both() -> None:
    network = adapted(num_temporal_adapters=2)
    names = [name for name, _ in network.named_parameters()]
    assert sum("qkv.weight" in name for name in names) == sum("out_proj.weight" in name for name in names) == 3
    parts = {name.split(".deltas.")[1].split(".", 1)[1] for name in names if ".deltas." in name}
    layers = [f"{layer}.{kind}" for layer in ("down", "up") for kind in ("weight", "bias")]
    assert parts == {f"{where}.{n}" for where in ("bottleneck", "bottleneck_in") for n in layers} | {"embedding"}
    stir(network, TemporalStep)
    x, block = torch.randn(SLICES, 7, WIDTH), network.blocks[0]
    step = delta_of(block, TemporalStep)
    before = step.around(block, lambda x: x, x)
    with torch.no_grad():
        block.attn.qkv.weight *= 2
    assert not torch.allclose(step.around(block, lambda x: x, x), before)


def test_swin_exchanges_in_blocks_of_even_place_in_their_stage() -> None:
    network = adapted(swin())
    found = {name for name, module in network.named_modules() if isinstance(module, TemporalStep)}
    places = {name.split(".deltas.")[0] for name in found}
    assert places == {f"layers{stage}.0.blocks.0" for stage in (1, 2, 3, 4)}
    assert sum(isinstance(delta, JointAdapter) for _, delta in deltas_of(network)) == 6
    assert {type(layer).__name__ for layer, d in deltas_of(network) if isinstance(d, SpatialAdapter)} == {
        "AdaptedWindowAttention"
    }


# what trains


BIG = [
    ("B/16, 8 slices", (224, 16, 768, 3072, 12, 12), AIM(8), 10_659_072, 96_456_192),
    ("B/16, two adapters", (224, 16, 768, 3072, 12, 12), AIM(8, num_temporal_adapters=2), 14_209_536, 100_006_656),
    ("B/16, 32 slices", (224, 16, 768, 3072, 12, 12), AIM(32), 10_677_504, 96_475_392),
    ("L/14, 32 slices", (224, 14, 1024, 4096, 24, 16), AIM(32), 37_875_712, 341_053_440),
]


@pytest.mark.parametrize(("sizes", "method", "trained", "total"), [b[1:] for b in BIG], ids=[b[0] for b in BIG])
def test_counts_are_the_published_ones(sizes: tuple[int, ...], method: AIM, trained: int, total: int) -> None:
    size, patch, width, inner, layers, heads = sizes
    with torch.device("meta"):
        plain = ViT(
            3, (size, size), patch, width, inner, layers, heads, spatial_dims=2, classification=True, qkv_bias=True
        )
        del plain.classification_head
        clip = method.num_slices == 32  # a norm before the blocks and no bias of the patches
        network = mp.adapt(AIMViT(plain, nn.LayerNorm(width) if clip else None), method)
    counted = mp.summary(network)
    assert counted.trainable == trained
    unused = 2 * width * layers  # norms of the cross attention that MONAI's blocks have and do not use
    position = width  # of the class token, which is folded into it
    assert counted.total - unused + position - (width if clip else 0) == total


@pytest.mark.parametrize("name", ["ViT", "Swin"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_slices": 5, "ratio": 0.5},
        {"num_temporal_adapters": 2, "ratio": 0.4},
        {"temporal": False},
        {"spatial": False},
        {"joint": False},
        {"temporal": False, "spatial": False, "joint": False},
    ],
)
def test_counts_by_formula(name: str, options: dict[str, Any]) -> None:
    method = AIM(**{"num_slices": SLICES, **options})
    network = adapted(TRANSFORMERS[name][0](), **options)

    def adapter(width: int) -> int:
        hidden = int(method.ratio * width)
        return 2 * width * hidden + hidden + width

    if name == "ViT":
        places = method.temporal * method.num_temporal_adapters + method.spatial + method.joint
        wanted = 3 * places * adapter(WIDTH) + method.temporal * method.num_slices * WIDTH + 2 * WIDTH
    else:
        wanted = 0
        for width, blocks, heads in ((8, 2, 2), (16, 1, 2), (32, 2, 4), (64, 1, 4)):
            wanted += blocks * (method.spatial + method.joint) * adapter(width)
            table = (2 * method.num_slices - 1) * heads
            wanted += method.temporal * (method.num_temporal_adapters * adapter(width) + table)
    assert mp.summary(network).trainable == wanted


def test_adapters_embedding_final_norm_and_head_train_and_all_else_stays() -> None:
    network = ViTSegmenter(vit(), 2, (8, 12), feature_size=4)
    mp.adapt(network, AIM(num_slices=SLICES), also_train=["decoder"])
    for name in (names := trained_names(network)):
        assert "_adapter_" in name or "slice_" in name or name.startswith(("decoder.", "backbone.norm.")), name
    assert {"backbone.norm.weight", "backbone.norm.bias"} <= names
    assert {n for n, p in network.named_parameters() if ".deltas." in n} <= names
    before, volume, probe = state_of(network), volumes(), torch.randn(BATCH, 2, 8, 12, SLICES)
    train(network, lambda: (network(volume) * probe).mean(), steps=1, weight_decay=0.1)
    assert differing(before, state_of(network)) <= names
    assert differing(before, state_of(network))


@pytest.mark.parametrize("name", ["ViT", "Swin"])
def test_first_step_moves_up_and_the_second_down(name: str) -> None:
    make, size = TRANSFORMERS[name]
    network, volume = adapted(make()), volumes(size=size)
    probe = torch.randn_like(maps(network, volume))

    def gradients() -> dict[str, bool]:
        network.zero_grad()
        (maps(network, volume) * probe).mean().backward()
        return {n: bool(p.grad.any()) for n, p in network.named_parameters() if p.requires_grad}

    first = gradients()
    assert {n: moves for n, moves in first.items() if ".up." in n} == {n: True for n in first if ".up." in n}
    later = [n for n in first if ".down." in n or "bias_table" in n]
    assert later
    assert not any(first[n] for n in later)
    train(network, lambda: (maps(network, volume) * probe).mean(), steps=1)
    second = gradients()
    # at the last stage of the Swin a key's bias has no effect on one place; all weights have
    assert all(second[n] for n in later if n.endswith("weight") or "bias_table" in n)


def test_frozen_dropout_is_off_in_training() -> None:
    network = stir(adapted(vit(dropout_rate=0.5))).train()
    volume = volumes()
    with torch.no_grad():
        assert torch.equal(network(volume)[0], network.eval()(volume)[0])
    assert not [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


# stochastic depth


def test_rates_rise_linearly_at_the_temporal_step_and_the_joint_adapter_alone() -> None:
    network = adapted(drop_path=0.2)
    found = {n: m.drop_prob for n, m in network.named_modules() if isinstance(m, DropPath)}
    assert all("temporal_adapter" in name or "joint_adapter" in name for name in found)
    for kind in ("temporal", "joint"):
        rates = [rate for name, rate in found.items() if kind in name]
        assert rates == pytest.approx([0, 0.1, 0.2])


@torch.no_grad()
def test_volumes_or_slices_are_dropped_whole_and_the_rest_is_scaled() -> None:
    block = vit().blocks[0]
    step = TemporalStep(Slices(), SLICES, True, WIDTH, 6, drop_path=0.5).train()
    beside = JointAdapter(WIDTH, 6, 0.5, 0.5).train()
    for delta in (step, beside):
        for parameter in delta.parameters():
            nn.init.normal_(parameter, 0, 0.3)
    x, y = torch.randn(2, 8 * SLICES, 7, WIDTH)
    added = step.around(block, lambda x: x, x) - x
    full = step.eval().around(block, lambda x: x, x) - x
    factors = (added / full).unflatten(0, (8, SLICES)).flatten(1)  # a row for each volume
    torch.testing.assert_close(factors, factors.mean(1, keepdim=True).round().expand_as(factors), atol=1e-2, rtol=0)
    assert set(factors.mean(1).round().tolist()) == {0.0, 2.0}
    factors = ((beside(x, y) - y) / (beside.eval()(x, y) - y)).flatten(1)  # a row for each slice
    torch.testing.assert_close(factors, factors.mean(1, keepdim=True).round().expand_as(factors), atol=1e-2, rtol=0)
    assert set(factors.mean(1).round().tolist()) == {0.0, 2.0}
    by_volume = factors.mean(1).round().unflatten(0, (8, SLICES)).tolist()
    assert any(len(set(row)) == 2 for row in by_volume)


@torch.no_grad()
def test_evaluation_is_deterministic_and_no_rate_is_evaluation() -> None:
    volume = volumes(batch=8)
    network = stir(adapted(drop_path=0.9))
    assert torch.equal(network(volume)[0], network(volume)[0])
    evaluated = network(volume)[0]
    assert not torch.allclose(network.train()(volume)[0], evaluated)
    still = stir(adapted()).train()
    trained = still(volume)[0]
    assert torch.equal(still.eval()(volume)[0], trained)


# the number of slices


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_other_depths_are_interpolated_or_refused(name: str, count: int) -> None:
    make, size = TRANSFORMERS[name]
    network = stir(adapted(make()))
    assert maps(network, volumes(count, size=size)).shape[:2] == (BATCH, count)
    strict = adapted(make(), interpolate=False)
    maps(strict, volumes(SLICES, size=size))
    with pytest.raises(ValueError, match=f"num_slices=3 and interpolate=False, got a volume of {count} slices"):
        maps(strict, volumes(count, size=size))


@torch.no_grad()
def test_embedding_is_stretched_linearly() -> None:
    table = torch.tensor([[0.0, 1.0], [2.0, 1.0], [6.0, 1.0]])
    embedding = SliceEmbedding(Slices(5), 3, True, 2)
    embedding.embedding.copy_(table)
    x = torch.zeros(10, 4, 2)
    wanted = torch.tensor([0.0, 1.0, 2.0, 4.0, 6.0]).repeat(2)
    assert torch.allclose(embedding(x, x)[:, 3, 0], wanted)
    assert torch.allclose(embedding(x, x)[..., 1], torch.ones(10, 4))


@torch.no_grad()
def test_fewer_slices_keep_the_biases_of_their_offsets_and_more_stretch_them() -> None:
    step = TemporalStep(Slices(), 3, True, 8, 2, heads=1)
    step.bias_table.copy_(torch.tensor([[-20.0], [-10.0], [0.0], [10.0], [20.0]]))
    assert step.biases(2).tolist() == [[[0, -10], [10, 0]]]
    assert step.biases(1).tolist() == [[[0]]]
    assert torch.allclose(step.biases(5)[0, :, 0], torch.tensor([0.0, 5.0, 10.0, 15.0, 20.0]))


def test_batch_that_is_no_whole_number_of_volumes_is_named() -> None:
    network = mp.adapt(vit(), AIM(num_slices=4))
    assert len(network(torch.randn(8, 1, 8, 12))[0]) == 8
    with pytest.raises(ValueError, match="a batch of 6 slices is no whole number of volumes of 4 slices"):
        network(torch.randn(6, 1, 8, 12))
    with slices_of(network).given(3):
        assert len(network(torch.randn(6, 1, 8, 12))[0]) == 6
    assert len(mp.adapt(vit(), AIM(num_slices=4, temporal=False))(torch.randn(3, 1, 8, 12))[0]) == 3


# files, copies and other adapters


def test_plain_state_loads_and_an_adapter_restores_the_outputs(tmp_path) -> None:
    plain = AIMViT(vit())
    state = state_of(plain)
    network = adapted(copy.deepcopy(plain))
    deltas = {n for n in network.state_dict() if ".deltas." in n}
    assert set(network.state_dict()) - set(state) == deltas
    assert set(state) <= set(network.state_dict())
    network.load_state_dict(state)
    volume, probe = volumes(), torch.randn(BATCH * SLICES, 7, WIDTH)
    train(network, lambda: (network(volume)[0] * probe).mean(), steps=3)
    path = mp.save_adapter(network.eval(), tmp_path / "aim.safetensors")
    assert set(mp.adapter_state_dict(network)) == deltas | {"norm.weight", "norm.bias"}
    again = mp.load_adapter(copy.deepcopy(plain), path).eval()
    with frozen(network, again):
        assert torch.equal(again(volume)[0], network(volume)[0])
        assert not torch.allclose(again(volume)[0], plain(volume)[0], atol=1e-3)
        with mp.disabled(again):
            torch.testing.assert_close(again(volume)[0], plain(volume)[0], atol=0, rtol=0)
    mp.remove_adapter(again)
    assert not differing(state, state_of(again))
    assert list(again.state_dict()) == list(state)


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_copies_and_pickles_compute_the_same_at_any_depth(name: str) -> None:
    make, size = TRANSFORMERS[name]
    network = stir(adapted(make()))
    copied = copy.deepcopy(network)
    for other in (copied, pickle.loads(pickle.dumps(network))):
        for count in (SLICES, 5):
            volume = volumes(count, size=size)
            assert torch.equal(maps(other, volume), maps(network, volume))
    shared = {id(delta.slices) for _, delta in deltas_of(copied) if isinstance(delta, TemporalStep | SliceEmbedding)}
    assert shared == {id(slices_of(copied))} != {id(slices_of(network))}


@pytest.mark.slow
@torch.no_grad()
def test_compiled_networks_compute_the_same() -> None:
    network = stir(adapted(vit(num_layers=1)))
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=False)
    for count in (SLICES, 2):
        volume = volumes(count)
        torch.testing.assert_close(compiled(volume)[0], network(volume)[0])
    block, x = stir(adapted(swin())).layers2[0].blocks[0], torch.randn(BATCH * SLICES, 5, 4, 16)
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x, None), block(x, None))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_and_exported_networks_compute_the_same_for_any_batch() -> None:
    network, example = stir(adapted(vit(num_layers=1))), volumes()
    traced = torch.jit.trace(network, example, check_trace=False)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(network, (example,), dynamic_shapes=({0: batch},)).module()
    for count in (1, 4):
        volume = volumes(batch=count)
        for other in (traced, exported):
            torch.testing.assert_close(other(volume)[0], network(volume)[0])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_half_precision_by_autocast_trains(name: str) -> None:
    make, size = TRANSFORMERS[name]
    network, volume = stir(adapted(make()), std=0.1), volumes(size=size)
    wanted = maps(network, volume)
    with torch.autocast("cpu", torch.bfloat16):
        found = maps(network, volume)
        found.float().square().mean().backward()
    assert (found - wanted).abs().max() < 0.2
    assert all(p.grad.isfinite().all() for p in mp.trainable_parameters(network) if p.grad is not None)
    low = network.bfloat16()
    assert maps(low, volume.bfloat16()).dtype == torch.bfloat16


def test_deltas_have_the_type_of_the_network() -> None:
    for make, size in TRANSFORMERS.values():
        network = adapted(make().double())
        assert {p.dtype for p in network.parameters()} == {torch.float64}
        assert maps(network, volumes(size=size).double()).dtype == torch.float64


@torch.no_grad()
def test_lora_beside_it_changes_both_uses_of_the_attention() -> None:
    network = mp.adapt(AIMViT(vit()), [AIM(num_slices=SLICES), LoRA(rank=2)]).eval()
    stir(network)
    x, block = torch.randn(SLICES, 7, WIDTH), network.blocks[0]
    step, attn = delta_of(block, TemporalStep), block.attn
    before = step.around(block, lambda x: x, x), attn(x)
    for name, parameter in network.named_parameters():
        if "lora" in name:
            parameter.normal_()
    assert not torch.allclose(step.around(block, lambda x: x, x), before[0], atol=1e-3)
    assert not torch.allclose(attn(x), before[1], atol=1e-3)


def test_it_cannot_be_merged() -> None:
    with pytest.raises(TypeError, match="cannot be merged"):
        mp.merge(adapted())


# what does not fit


def test_networks_without_a_2d_transformer_are_named() -> None:
    sizes = {"feature_size": 4, "hidden_size": 12, "mlp_dim": 12, "num_heads": 1}
    refused = {
        "ViT has a 3D ViT": ViT(1, (8, 8, 8), (4, 4, 4), 12, 12, 1, 1),
        "UNETR has a 3D ViT": UNETR(1, 2, (16, 16, 16), **sizes),
        "SwinUNETR has a 3D SwinTransformer": SwinUNETR(1, 2, feature_size=12, num_heads=(1, 1, 1, 1)),
        "UNet has no transformer": UNet(2, 1, 2, (4, 8), (2,)),
    }
    for message, network in refused.items():
        with pytest.raises(TypeError, match=rf"AIM needs a 2D ViT.*; this {message}.* Use LoRA\(\) or VPETL\(\)"):
            mp.adapt(network, AIM())
        assert not [n for n in network.state_dict() if "deltas" in n]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slices": 0}, "num_slices must be a whole number of at least 1, got 0"),
        ({"num_slices": 2.5}, "num_slices must be a whole number"),
        ({"num_slices": True}, "num_slices must be a whole number"),
        ({"num_temporal_adapters": 3}, "num_temporal_adapters must be 1 or 2, got 3"),
        ({"num_temporal_adapters": 0}, "num_temporal_adapters must be a whole number of at least 1"),
        ({"ratio": 0}, "ratio must be positive, got 0"),
        ({"ratio": float("nan")}, "ratio must be positive"),
        ({"ratio": 0.01}, "ratio=0.01 leaves nothing of 24 channels; choose at least 0.0417"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1, got 1.0"),
        ({"drop_path": -0.1}, "drop_path must be at least 0"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    network = vit()
    with pytest.raises(ValueError, match=message):
        mp.adapt(network, AIM(**options))
    assert not [n for n in network.state_dict() if "deltas" in n]


# a task


def task(generator: torch.Generator, batch: int = 8) -> tuple[Tensor, Tensor]:
    """Pairs of slices of dark and bright patches; the label of a slice is bright where the other one is."""
    bright = torch.randint(0, 2, (batch, 4, 4, 2), generator=generator)
    label = bright.flip(-1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    image = (2.0 * bright - 1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return image[:, None] + 0.1 * torch.randn(image[:, None].shape, generator=generator), label


def dice_after_training(exchange: bool, decoder: str) -> float:
    torch.manual_seed(0)
    backbone = ViT(1, (8, 8), (2, 2), 32, 64, 1, 2, spatial_dims=2, qkv_bias=True)
    network = ViTSegmenter(backbone, 2, (8, 8), decoder=decoder, feature_size=4)
    mp.adapt(network, AIM(num_slices=2, temporal=exchange), also_train=["decoder"])
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(mp.trainable_parameters(network), lr=2e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-2, total_steps=80)
    for _ in range(80):
        image, label = task(generator)
        optimiser.zero_grad()
        F.cross_entropy(network(image), label).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        image, label = task(generator, 64)
        found = network.eval()(image).argmax(1)
    return (2 * (found * label).sum() / (found.sum() + label.sum())).item()


@pytest.mark.parametrize("decoder", ["linear", "native"])
def test_what_the_neighbouring_slice_shows_is_learnt_with_the_temporal_step_alone(decoder: str) -> None:
    assert dice_after_training(True, decoder) > 0.95
    assert dice_after_training(False, decoder) < 0.75  # all bright gives 2 / 3
