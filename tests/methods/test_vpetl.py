"""V-PETL: the published numbers, the formula restated by hand, and what the method promises about a network."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import TransformerBlock
from monai.networks.blocks.selfattention import SABlock
from monai.networks.layers import DropPath
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import BasicLayer, PatchMergingV2, SwinTransformer, WindowAttention
from torch import Tensor, nn

from monai_petl import (
    AdapterFileError,
    adapt,
    disabled,
    load_adapter,
    merge,
    remove_adapter,
    save_adapter,
    summary,
    trainable_parameters,
)
from monai_petl.core.deltas import deltas_of
from monai_petl.methods import VPETL, FFNAdapter
from monai_petl.methods.vpetl import PATTDelta
from tests.conftest import differing, frozen, state_of
from tests.methods.small_networks import (
    NETWORKS,
    TRANSFORMERS,
    build,
    output,
    segresnet,
    shaken,
    swin_unetr,
    teach,
    trained_names,
    unetr,
    vit,
    without_gradient,
)
from tests.weights.inflation.published import Case, deviation, image, load_cases, load_expected, tensor

SLOTS = {"q": 0, "k": 1, "v": 2}

# published numbers

CASES = load_cases("vpetl")
EXPECTED = load_expected("vpetl")
OUR_NAMES = (  # the fixture's names as those of an adapted network of MONAI; parts of one tensor get one name
    ("attn.query", "attn.qkv"),
    ("attn.key", "attn.qkv"),
    ("attn.value", "attn.qkv"),
    ("attn.out", "attn.proj"),
    ("relative_bias_table", "relative_position_bias_table"),
    ("attn.patt.down", "attn.qkv.deltas.patt_default.down"),
    *((f"attn.patt.up_{slot}", "attn.qkv.deltas.patt_default.up") for slot in SLOTS),
    ("mlp.fc", "mlp.linear"),
    ("ffn_adapter", "mlp.deltas.ffn_default"),
    ("patch_embed.weight", "patch_embed.proj.weight"),
    ("patch_embed.bias", "patch_embed.proj.bias"),
    *((f"stages.{stage}.", f"layers{stage + 1}.0.") for stage in range(4)),
    (".merge.", ".downsample."),
)


class PlaneMerging(PatchMergingV2):
    """Merging within the planes of a volume, as the published network does it."""

    def __init__(self, dim: int, norm_layer: type[nn.LayerNorm], spatial_dims: int) -> None:
        super().__init__(dim, norm_layer, spatial_dims=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def parts(case: Case) -> dict[str, list[dict]]:
    """The rows of the fixture that make up each tensor of ours, in order."""
    found: dict[str, list[dict]] = {}
    for row in case["tensors"]:
        found.setdefault(our_name(case, row["name"]), []).append(row)
    return found


def our_name(case: Case, name: str) -> str:
    config = case["config"]
    name = name.removeprefix(case["prefix"])
    for theirs, ours in OUR_NAMES:
        name = name.replace(theirs, ours)
    side = str(config.get("layernorm", "")).partition(" ")[0]
    return name.replace("ffn_default.norm.", f"ffn_default.norm_{side}.")


def published(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network of a case with the method attached and the fixture's weights; and the weights that have no place in it."""
    config = case["config"]
    unit = config["unit"]
    width = config.get("hidden_size", config.get("embed_dim"))
    ffn = {"ffn_bottleneck": config.get("ffn_bottleneck"), "ffn_scale": config.get("ffn_scale", 0.1)}
    method: Any = FFNAdapter
    prefix = ""
    if unit.startswith("MLP"):
        network: nn.Module = TransformerBlock(width, config["mlp_dim"], 1)
        scale = config["scale"] if isinstance(config["scale"], float) else None
        norm = config["layernorm"].partition(" ")[0]
        method = FFNAdapter(config["bottleneck"], scale, config["mode"], norm)
    else:
        method = VPETL(config["mode"], config["bottleneck"], scale=config["scale"], **ffn)
        if unit.startswith("window"):
            network = WindowAttention(width, config["num_heads"], config["window"], config["qkv_bias"])
            prefix = "attn."
        elif unit.startswith("one stage"):
            ratio = config["mlp_dim"] / width
            network = BasicLayer(width, 2, config["num_heads"], config["window"], [0.0, 0.0], ratio, qkv_bias=True)
        else:
            network = SwinTransformer(
                config["in_channels"],
                width,
                config["window"],
                config["patch_size"],
                config["depths"],
                config["num_heads"],
                patch_norm=True,
                spatial_dims=len(config["window"]),
                downsample=PlaneMerging if len(config["window"]) == 3 else "mergingv2",
            )
    network = adapt(network, method).eval()
    state = {n.removeprefix(prefix): torch.cat([tensor(row) for row in rows]) for n, rows in parts(case).items()}
    left_over = network.load_state_dict(state, strict=False)
    missing = [n for n in left_over.missing_keys if n.partition(".")[0] in ("qkv", "proj", "mlp", "layers1", "layers2")]
    assert not [n for n in missing if not n.endswith("relative_position_index") and "downsample" not in n]
    assert all(n.startswith("norm.") for n in left_over.unexpected_keys)
    return network.requires_grad_(True), {n: state[n] for n in left_over.unexpected_keys}


def run(case: Case, network: Any, rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a case by the fixture's names."""
    x = image(case)
    if isinstance(network, WindowAttention):
        mask = None
        if case["config"]["mask"]:
            blocked = (image(case, "mask") > 0.8) & ~torch.eye(x.shape[1], dtype=torch.bool)
            mask = torch.where(blocked, -100.0, 0.0)
        return {"attention": network(x, mask)}
    if isinstance(network, TransformerBlock):
        return {"mlp": network.mlp(x)}
    if isinstance(network, BasicLayer):
        return blocks_of(network, x)[0]
    found = {"patch_embed": network.patch_embed(x)}
    y = found["patch_embed"]
    for stage in range(network.num_layers):
        blocks, y = blocks_of(network.get_submodule(f"layers{stage + 1}.0"), y)
        found |= {f"stages.{stage}.blocks": blocks["blocks.1"], f"stages.{stage}.merged": y}
    last = blocks["blocks.1"].movedim(1, -1)
    found["final"] = F.layer_norm(last, last.shape[-1:], rest["norm.weight"], rest["norm.bias"]).movedim(-1, 1)
    return found


def blocks_of(stage: Any, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of a stage's blocks, and of the stage."""
    found: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda m, i, y, n=n: found.update({f"blocks.{n}": y.movedim(-1, 1)}))
        for n, block in enumerate(stage.blocks)
    ]
    y = stage(x)
    for hook in hooks:
        hook.remove()
    return found, y


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_it_computes_the_published_values_and_gradients(case, record_property):
    network, rest = published(case)
    found = run(case, network, rest)
    recorded = [row["key"].partition("/")[2] for row in case["outputs"]]
    error = max(deviation(EXPECTED, case, name, found[name]) for name in recorded)
    record_property("relative error", error)
    assert error < 2e-6
    if "gradients" not in case:
        return
    wanted = case["gradients"]
    (found[wanted["of"].partition("/")[2]] * tensor(wanted["probe"])).mean().backward()
    prefix = "attn." if isinstance(network, WindowAttention) else ""
    errors = []
    for row in wanted["wrt"]:
        ours = our_name(case, row["tensor"])
        names = [part["name"] for part in parts(case)[ours]]
        grad = network.get_parameter(ours.removeprefix(prefix)).grad.chunk(len(names))[names.index(row["tensor"])]
        errors.append(deviation(EXPECTED, {**case, "outputs": wanted["wrt"]}, row["key"].partition("/")[2], grad, 10))
    record_property("relative error of gradients", max(errors))
    assert max(errors) < 1e-5


def test_the_published_network_in_2d_runs_as_a_whole():
    case = next(case for case in CASES if case["name"] == "swin2d_kv")
    network, rest = published(case)
    found = run(case, network, rest)
    whole = network(image(case), normalize=False)
    assert all(torch.equal(whole[i + 1], found[f"stages.{i}.merged"]) for i in range(3))


# the formula


def attention_by_hand(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float, out: nn.Linear
) -> Tensor:
    """softmax(Q K^T / sqrt(head width) + bias) V, head by head."""
    rows = []
    for sample in range(len(x)):
        by_head = []
        for head in range(heads):
            qh, kh, vh = (t[sample].chunk(heads, -1)[head] for t in (q, k, v))
            logits = qh @ kh.T / qh.shape[-1] ** 0.5
            by_head.append((logits + (bias[sample, head] if isinstance(bias, Tensor) else bias)).softmax(-1) @ vh)
        rows.append(out(torch.cat(by_head, -1)))
    return torch.stack(rows)


def added(
    x: Tensor, targets: str, s: float, down: nn.Linear, ups: dict[str, Tensor], biases: dict
) -> dict[str, Tensor]:
    """What PATT adds to q, k and v."""
    u = torch.tanh(F.linear(x, down.weight, down.bias))
    return {t: s * F.linear(u, ups[t], biases[t]) if t in targets else 0 for t in SLOTS}


def filled(network: nn.Module) -> nn.Module:
    """Deltas as after training."""
    with torch.no_grad():
        for _, delta in deltas_of(network):
            for parameter in delta.parameters():
                parameter.normal_(0, 0.3)
    return network


def split(delta: PATTDelta, targets: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights = delta.up.weight.chunk(len(targets))
    biases = [None] * len(targets) if delta.up.bias is None else delta.up.bias.chunk(len(targets))
    return dict(zip(targets, weights, strict=True)), dict(zip(targets, biases, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("targets", ["kv", "qv", "qk", "qkv"])
def test_window_attention_equals_the_formula(targets, qkv_bias, masked):
    attention = shaken(WindowAttention(12, 3, (2, 3), qkv_bias))
    filled(adapt(attention, VPETL(targets, bottleneck=5, scale=0.7, ffn_bottleneck=None)))
    x = torch.randn(4, 6, 12)
    mask = torch.zeros(2, 6, 6).masked_fill(torch.rand(2, 6, 6) > 0.7, -100.0) if masked else None
    (_, delta), *others = deltas_of(attention)
    assert not others
    plain = F.linear(x, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
    extra = added(x, targets, 0.7, delta.down, *split(delta, targets))
    q, k, v = (plain[place] + extra[t] for t, place in SLOTS.items())
    place = attention.relative_position_index
    bias = attention.relative_position_bias_table[place].permute(2, 0, 1).repeat(4, 1, 1, 1)
    if masked:
        bias = bias + mask.repeat(2, 1, 1)[:, None]
    with frozen(attention):
        assert torch.allclose(attention(x, mask), attention_by_hand(x, q, k, v, 3, bias, attention.proj), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"dim_head": 7}, {"hidden_input_size": 10}, {"qkv_bias": True}], ids=str)
@pytest.mark.parametrize("combined", [True, False], ids=["combined", "separate"])
@pytest.mark.parametrize("targets", ["kv", "qv", "qk", "qkv"])
def test_attention_of_a_vision_transformer_equals_the_formula(targets, combined, options):
    attention = shaken(SABlock(12, 3, use_combined_linear=combined, **options)).eval()
    filled(adapt(attention, VPETL(targets, bottleneck=5, scale=0.7, ffn_bottleneck=None)))
    x = torch.randn(2, 6, attention.hidden_input_size)
    found = [delta for _, delta in deltas_of(attention)]
    if combined:
        plain = F.linear(x, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
        ups, biases = split(found[0], targets)
    else:
        plain = [F.linear(x, m.weight, m.bias) for m in (attention.to_q, attention.to_k, attention.to_v)]
        ups = {t: d.up.weight for t, d in zip(targets, found, strict=True)}
        biases = {t: d.up.bias for t, d in zip(targets, found, strict=True)}
    extra = added(x, targets, 0.7, found[0].down, ups, biases)
    q, k, v = (plain[place] + extra[t] for t, place in SLOTS.items())
    with frozen(attention):
        assert torch.allclose(attention(x), attention_by_hand(x, q, k, v, 3, 0.0, attention.out_proj), atol=1e-6)


def test_relative_positions_read_the_query_after_the_addition():
    attention = shaken(SABlock(12, 3, rel_pos_embedding="decomposed", input_size=(2, 3))).eval()
    filled(adapt(attention, VPETL("qv", bottleneck=5, ffn_bottleneck=None)))
    x = torch.randn(2, 6, 12)
    delta = deltas_of(attention)[0][1]
    extra = added(x, "qv", 0.8, delta.down, *split(delta, "qv"))
    plain = F.linear(x, attention.qkv.weight).chunk(3, -1)
    q, k, v = (plain[place] + extra[t] for t, place in SLOTS.items())
    by_head = q.unflatten(-1, (3, 4)).transpose(1, 2)  # (B, heads, N, C / heads)
    bias = attention.rel_positional_embedding(x, torch.zeros(2, 3, 6, 6), by_head)
    with frozen(attention):
        assert torch.allclose(attention(x), attention_by_hand(x, q, k, v, 3, bias, attention.out_proj), atol=1e-6)


@pytest.mark.parametrize("targets", ["kv", "qv", "qk"])
def test_what_is_not_adapted_passes_bit_for_bit(targets):
    attention = adapt(SABlock(12, 3), VPETL(targets, bottleneck=5, ffn_bottleneck=None, init="published"))
    x = torch.randn(2, 6, 12)
    before = F.linear(x, attention.qkv.weight).chunk(3, -1)
    after = attention.qkv(x).chunk(3, -1)
    assert {t for t, place in SLOTS.items() if not torch.equal(before[place], after[place])} == set(targets)


# the start


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_starts_as_the_backbone_unless_told_otherwise(name):
    backbone, x = build(name)
    zero = adapt(copy.deepcopy(backbone), VPETL())
    as_published = adapt(copy.deepcopy(backbone), VPETL(init="published"))
    without_effect = filled(adapt(copy.deepcopy(backbone), VPETL(scale=0.0, ffn_scale=0.0)))
    with frozen(backbone, zero, as_published, without_effect):
        expected = output(backbone, x)
        assert torch.equal(output(zero, x), expected)
        assert torch.equal(output(without_effect, x), expected)
        assert not torch.allclose(output(as_published, x), expected)
        with disabled(as_published):
            assert torch.equal(output(as_published, x), expected)


# counts


@pytest.mark.parametrize(
    ("targets", "bias", "count"),
    [
        ("kv", True, 3 * 24 * 8 + 8 + 2 * 24),
        ("qk", False, 3 * 24 * 8),
        ("qkv", True, 4 * 24 * 8 + 8 + 3 * 24),
        ("qkv", False, 4 * 24 * 8),
    ],
)
def test_the_count_of_a_block(targets, bias, count):
    for combined in (True, False):
        attention = SABlock(24, 3, qkv_bias=bias, use_combined_linear=combined)
        assert summary(adapt(attention, VPETL(targets, bottleneck=8, ffn_bottleneck=None))).trainable == count
    other = adapt(SABlock(24, 3, qkv_bias=not bias), VPETL(targets, bottleneck=8, ffn_bottleneck=None, bias=bias))
    assert summary(other).trainable == count


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (VPETL(bottleneck=128, ffn_bottleneck=None), 4_647_424),
        (FFNAdapter(64), 1_553_664),
        (VPETL(bottleneck=128), 6_201_088),
    ],
    ids=["PATT", "FFN adapters", "both"],
)
def test_the_counts_of_the_published_network(method, count):
    with torch.device("meta"):
        stages = [
            BasicLayer(width, depth, heads, (8, 7, 7), [0.0] * depth, qkv_bias=True)
            for width, depth, heads in ((128, 2, 4), (256, 2, 8), (512, 18, 16), (1024, 2, 32))
        ]
        network = nn.Sequential(*stages)
        assert summary(adapt(network, method)).trainable == count


def test_the_default_bottleneck_is_a_quarter_of_the_width_but_not_less_than_eight():
    network = adapt(swin_unetr(), VPETL())
    inner = [delta.down.out_features for _, delta in deltas_of(network) if isinstance(delta, PATTDelta)]
    assert inner == [8, 8, 8, 8, 12, 12, 24, 24]
    assert summary(adapt(SABlock(24, 3), VPETL(ratio=0.5, ffn_bottleneck=None))).trainable == 3 * 24 * 12


# training


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("also_train", [(), ("out",)])
def test_only_what_was_added_or_named_trains_and_all_of_it_does(name, also_train):
    backbone, x = build(name)
    if name == "ViT":
        also_train = tuple("classification_head" for _ in also_train)
    network = adapt(backbone, VPETL(), also_train)
    before = state_of(network)
    trains = trained_names(network)
    assert all(".deltas." in n or n.startswith(also_train) for n in trains)
    assert any(n.startswith(also_train) for n in trains) or not also_train
    teach(network, x, steps=1)
    first_step = without_gradient(network)  # up is zero
    assert first_step == {n for n in trains if ".down." in n}
    assert trains - first_step <= differing(before, state_of(network)) <= trains
    teach(network, x, steps=1)
    assert not without_gradient(network)


def test_attention_keeps_its_number_of_tokens():
    network, x = build("SwinUNETR")
    shapes: list[tuple] = []
    for module in network.modules():
        if isinstance(module, WindowAttention):
            module.register_forward_hook(lambda m, i, y: shapes.append((i[0].shape, y.shape)))
    output(network, x)
    before = shapes.copy()
    shapes.clear()
    output(filled(adapt(network, VPETL("qkv"))), x)
    assert shapes == before
    assert len(shapes) == 8


def test_dropout_and_stochastic_depth_of_the_frozen_part_are_off_in_training():
    network = swin_unetr(drop_rate=0.3, attn_drop_rate=0.3, dropout_path_rate=0.4)
    x = torch.randn(2, 1, 64, 64)
    assert not torch.equal(output(network.train(), x), output(network, x))
    adapt(network, VPETL()).train()
    random = [m for m in network.modules() if isinstance(m, nn.Dropout | DropPath)]
    assert random
    assert not any(m.training for m in random)
    assert torch.equal(output(network, x), output(network, x))


# files, and taking it away


def test_a_file_holds_the_delta_alone_and_gives_the_same_output(tmp_path):
    backbone = shaken(vit(hidden_size=192, mlp_dim=192)).eval()
    x = torch.randn(2, 1, 16, 16)
    network = teach(adapt(copy.deepcopy(backbone), VPETL()), x)
    path = save_adapter(network, tmp_path / "vpetl.safetensors")
    size = 4 * sum(p.numel() for p in trainable_parameters(network))
    assert size < path.stat().st_size < 1.05 * size
    again = load_adapter(copy.deepcopy(backbone), path).eval()
    with frozen(network, again):
        assert torch.equal(output(again, x), output(network, x))
    with pytest.raises(AdapterFileError, match="patch_embedding"):
        load_adapter(vit(hidden_size=96, mlp_dim=96), path)


def test_it_can_be_taken_away():
    network, x = build("SwinUNETR")
    before, text, expected = state_of(network), str(network), output(network, x)
    teach(adapt(network, VPETL()), x)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        adapt(network, VPETL())
    remove_adapter(network)
    assert str(network) == text
    assert list(network.state_dict()) == list(before)
    assert not differing(before, network.state_dict())
    assert torch.equal(output(network.requires_grad_(True), x), expected)


def test_it_cannot_be_merged():
    network = adapt(vit(), VPETL())
    with pytest.raises(TypeError, match=r"cannot be merged: what it adds is no linear function of the input"):
        merge(network)


# the ways in which networks are run


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("make", [vit, swin_unetr, unetr])
def test_images_and_volumes(make, spatial_dims):
    edges = {vit: (16, 16, 16), unetr: (32, 32, 32), swin_unetr: (64, 32, 32)}[make]
    network = adapt(make(spatial_dims), VPETL())
    teach(network, torch.randn(1, 1, *edges[:spatial_dims]))
    assert not without_gradient(network)


def test_checkpointing_gives_the_same_gradients():
    plain, x = build("SwinUNETR")
    filled(adapt(plain, VPETL()))
    saving = copy.deepcopy(plain)
    for module in saving.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = True
    grads = []
    for network in (plain, saving):
        output(network, x).square().mean().backward()
        grads.append([p.grad for p in trainable_parameters(network)])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_bfloat16_autocast_trains(name):
    network, x = build(name)
    filled(adapt(network, VPETL()))
    expected = output(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = output(network, x)
    assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()
    y.float().square().mean().backward()
    assert not without_gradient(network)
    assert all(p.grad.isfinite().all() for p in trainable_parameters(network))


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing(name):
    network, x = build(name)
    filled(adapt(network, VPETL("qv")))
    with frozen(network):
        traced = torch.jit.trace(network, x, check_trace=False)
        assert torch.allclose(output(traced, x), output(network, x), atol=1e-6)


@pytest.mark.parametrize(("name", "targets"), [("UNETR", "kv"), ("ViT", "qv")])
def test_torchscript(name, targets):
    network, x = build(name)
    filled(adapt(network, VPETL(targets)))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(network), buffer)
    buffer.seek(0)
    with frozen(network):
        assert torch.allclose(output(torch.jit.load(buffer), x), output(network, x), atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_separate_projections_can_be_traced_and_copied():
    attention = filled(adapt(SABlock(12, 3, use_combined_linear=False).eval(), VPETL(ffn_bottleneck=None)))
    x = torch.randn(2, 6, 12)
    with frozen(attention):
        expected = attention(x)
        assert torch.equal(torch.jit.trace(attention, x)(x), expected)
        other = copy.deepcopy(attention)
        assert torch.equal(other(x), expected)
        deltas_of(other)[0][1].down.weight.zero_()
        assert not torch.allclose(other(x), expected)
        assert torch.equal(attention(x), expected)


# refusals


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (VPETL("vk"), "targets must be 'kv', 'qv', 'qk' or 'qkv', got 'vk'"),
        (VPETL(init="random"), "init must be 'zero' or 'published', got 'random'"),
        (VPETL(bottleneck=0), "bottleneck must be a whole number of at least 1, got 0"),
        (VPETL(bottleneck=2.5), "bottleneck must be a whole number of at least 1, got 2.5"),
        (VPETL(ffn_bottleneck=-1), "bottleneck must be a whole number of at least 1, got -1"),
        (VPETL(ratio=-0.5), "ratio must be above 0, got -0.5"),
    ],
    ids=str,
)
def test_bad_values_are_refused_and_leave_nothing_behind(method, message):
    network = vit()
    text = str(network)
    with pytest.raises(ValueError, match=message):
        adapt(network, method)
    assert str(network) == text


@pytest.mark.parametrize("make", [segresnet, NETWORKS["UNet"][0]])
def test_networks_without_attention_are_refused(make):
    with pytest.raises(TypeError, match="has no attention"):
        adapt(make(), VPETL())


def test_a_vision_transformer_is_still_one():
    assert isinstance(adapt(vit(), VPETL()), ViT)
