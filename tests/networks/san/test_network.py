"""SAN: what the published network computed, and what it promises."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import SwinUNETR, ViT
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import monai_petl as mp
from monai_petl.core.summary import measure_step
from monai_petl.networks import SAN
from monai_petl.networks.san.recognition import read_regions
from monai_petl.networks.vit.attention_bias import add_attention_bias
from monai_petl.weights.inflation.files import set_eps
from tests.conftest import differing, state_of
from tests.weights.inflation.published import Case, deviation, image, load_cases, load_expected, tensor

CASES = load_cases("san")
EXPECTED = load_expected("san")


# the published function


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def our_state(case: Case) -> dict[str, Tensor]:
    given = {row["name"].removeprefix(case["prefix"]): tensor(row) for row in case["tensors"]}
    position = given.pop("backbone.pos_embed")
    state = {
        "backbone.cls_token": given.pop("backbone.cls_token") + position[:, :1],
        "backbone.patch_embedding.position_embeddings": position[:, 1:],
        "side.recognition.vectors": given.pop("class_vectors"),
        "side.recognition.log_scale": torch.tensor(math.log(case["config"]["recognition"]["class_scale"])),
    }
    if "sls_token" in given:
        state["side.recognition.tokens"] = given.pop("sls_token")
    if "backbone.proj" in given:
        state["backbone.projection.weight"] = given.pop("backbone.proj").mT.contiguous()
    for name in [n for n in given if ".attn.query." in n]:
        thirds = [given.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("query", "qkv")] = torch.cat(thirds)
    state |= given
    return {our_name(name): value for name, value in state.items()}


def our_name(name: str) -> str:
    name = name.replace("attn.out.", "attn.out_proj.").replace("fc1", "linear1").replace("fc2", "linear2")
    name = name.replace("backbone.patch_embed.", "backbone.patch_embedding.patch_embeddings.")
    name = name.replace("side.patch_embed.", "side.patch_embedding.").replace("side.pos_embed", "side.positions")
    name = name.replace("query_embed", "queries").replace("query_pos_embed", "query_positions")
    if name.startswith("side.fusion."):
        return name.replace("fusion.", "fusions.").replace(".norm.", ".0.").replace(".proj.", ".1.")
    if name.startswith("heads.") and "affine" not in name:
        _, head, layer, kind = name.split(".")
        return f"side.heads.{head}." + (f"last.{kind}" if layer == "2" else f"hidden.{2 * int(layer)}.{kind}")
    return f"side.{name}" if name.startswith("heads.") else name


def published(case: Case, depth: int | None = None) -> SAN:
    """The published form; with ``depth`` on volumes of as many slices, each a patch deep."""
    config, side, heads = case["config"], case["config"]["side"], case["config"]["heads"]
    backbone = config["backbone"]
    deep = (depth,) if depth else ()
    scale = 0.5 if "half" in backbone["input"] else 1.0
    size = tuple(g * side["patch_size"] for g in side["trained_grid"])
    vit = ViT(
        config["in_channels"],
        (*(int(s * scale) for s in size), *deep),
        (*[backbone["patch_size"]] * 2, *(1 for _ in deep)),
        backbone["hidden_size"],
        backbone["mlp_dim"],
        backbone["num_layers"],
        backbone["num_heads"],
        classification=True,
        spatial_dims=2 + len(deep),
        qkv_bias=True,
    )
    nn.init.zeros_(vit.patch_embedding.patch_embeddings.bias)
    if backbone["norm_pre"]:
        vit.norm_pre = nn.LayerNorm(backbone["hidden_size"])
        vit.projection = nn.Linear(backbone["hidden_size"], backbone["projection"], bias=False)
        for block in vit.blocks:
            block.mlp.fn = QuickGELU()
    set_eps(vit, backbone["norm_eps"])
    network = SAN(
        vit,
        config["recognition"]["num_classes"],
        (*size, *deep),
        mode="matched",
        side_patch=(*[side["patch_size"]] * 2, *(1 for _ in deep)),
        num_queries=side["num_queries"],
        start="cls+learned" if config["recognition"]["start"] == "pos_embedding" else "cls",
        pixel_upsample=0,
        side_width=side["width"],
        side_depth=side["depth"],
        side_heads=side["num_heads"],
        embed_dim=heads["embed"],
        head_dim=heads["hidden"],
        backbone_scale=scale,
    )
    state = our_state(case)
    if depth:
        wanted = network.state_dict()
        state = {n: v if v.shape == wanted[n].shape else v.unsqueeze(-1) for n, v in state.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert {n for n in missing if "cross_attn" not in n} == {"backbone.patch_embedding.patch_embeddings.bias"}
    return network.eval()


def outputs_of(case: Case, network: SAN, given: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    kept = []
    for number, block in enumerate(network.side.blocks, 1):
        kept.append(block.register_forward_hook(lambda m, i, o, name=f"side.block{number}": found.update({name: o})))
    depth = case["config"]["backbone"]["num_layers"]
    quarter, first = depth // 4, case["config"]["recognition"]["first_block"]
    states, tokens, grid = network.states(given)
    found |= {f"backbone.state{quarter * i}": state for i, state in enumerate(states)}
    found[f"backbone.cls{3 * quarter}"] = tokens[:, 0]
    spoken = network.side(given, states, 2)
    recognition, count = network.side.recognition, network.side.num_queries
    start = recognition.begin(tokens, math.prod(grid), count)
    for prefix, level in zip(("", "aux."), spoken, strict=True):
        found |= {f"{prefix}mask_logits": level.masks, f"{prefix}attention_bias": level.bias}
        pool = F.adaptive_max_pool2d if len(grid) == 2 else F.adaptive_max_pool3d
        pooled = pool(level.bias.flatten(1, 2), grid).flatten(2).unflatten(1, (-1, count))
        found[f"{prefix}pooled_bias"] = pooled
        blocks = read_regions(network.backbone.blocks[-quarter:], tokens, start, pooled)
        found |= {f"{prefix}sls.block{first + i}": value for i, value in enumerate(blocks)}
        found[f"{prefix}sls.norm"] = network.backbone.norm(blocks[-1])
    found |= zip(
        ("sls.embedding", "aux.sls.embedding"),
        (F.normalize(e, dim=-1) for e in network.embeddings(recognition, tokens, [s.bias for s in spoken], grid)),
        strict=True,
    )
    found |= zip(("class_logits", "aux.class_logits"), (s for _, s in network.levels(given, 2)), strict=True)
    found["semantic"] = network(given)
    whole = tokens
    for block in network.backbone.blocks[-quarter:]:
        whole = block(whole)
    found["backbone.cls_last"] = whole[:, 0]
    for hook in kept:
        hook.remove()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_output_is_the_published_one(case: Case) -> None:
    found = outputs_of(case, published(case), image(case))
    assert {f"{case['name']}/{name}" for name in found} == {row["key"] for row in case["outputs"]}
    for name, value in found.items():
        deviation(EXPECTED, case, name, value)


@pytest.mark.parametrize("depth", [None, 1])
def test_gradients_are_the_published_ones(depth: int | None) -> None:
    case = next(c for c in CASES if "gradients" in c)
    network, gradients = published(case, depth), case["gradients"]
    given = image(case) if depth is None else image(case).unsqueeze(-1)
    embedding = outputs_of(case, network, given)["sls.embedding"]
    (embedding * tensor(gradients["probe"])).mean().backward()
    for row in gradients["wrt"]:
        name = our_name(row["tensor"].removeprefix(case["prefix"]))
        found = network.get_parameter(name).grad.reshape(row["shape"])
        strided = found[tuple(slice(None, None, step) for step in row["stride"])].numpy()
        error = abs(strided - EXPECTED[row["key"]]).max() / row["max_abs"]
        assert error <= 10 * case["tolerance"], row["key"]


def test_volumes_of_one_slice_are_images() -> None:
    case = next(c for c in CASES if c["name"] == "plain_backbone")
    found = outputs_of(case, published(case, depth=1), image(case).unsqueeze(-1))
    for name, value in found.items():
        flat = value.squeeze(-1) if value.shape[-1] == 1 and not name.endswith("bias.0") else value
        deviation(EXPECTED, case, name, flat)


# the acceptance list

TEST_SIZE = {"size": "tiny", "side_width": 24, "side_depth": 4, "side_heads": 2, "embed_dim": 32, "head_dim": 32}


def backbone(
    size=(32, 32, 32), patch=(16, 16, 16), classification: bool = True, layers: int = 4, channels: int = 1
) -> ViT:
    torch.manual_seed(0)
    options = {"classification": classification, "spatial_dims": len(size), "qkv_bias": True}
    return ViT(channels, size, patch, 48, 96, layers, 4, **options)


def san(size=(32, 32, 32), patch=(16, 16, 16), classes: int = 3, vit: ViT | None = None, **options) -> SAN:
    vit = vit or backbone(size, patch)
    torch.manual_seed(1)
    return SAN(vit, classes, size, **{**TEST_SIZE, **options})


def adapted(*args, **options) -> SAN:
    return mp.adapt(san(*args, **options), [], also_train=["side"])


def noise(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("size", "patch", "side", "side_grid"),
    [
        ((32, 32, 32), (16, 16, 16), (8, 8, 8), (4, 4, 4)),
        ((32, 48), (16, 16), (8, 8), (4, 6)),
        ((32, 28, 10), (16, 14, 5), (8, 7, 5), (4, 4, 2)),
        ((32, 32, 8), (16, 16, 1), (8, 8, 1), (4, 4, 8)),
    ],
)
@pytest.mark.parametrize("mode", ["class_queries", "matched"])
def test_shapes(mode, size, patch, side, side_grid) -> None:
    network = san(size, patch, mode=mode, pixel_upsample=1).eval()
    grid = tuple(s // p for s, p in zip(size, patch, strict=True))
    queries, given = 3 if mode == "class_queries" else 32, noise(2, 1, *size)
    states, tokens, found_grid = network.states(given)
    assert [tuple(s.shape) for s in states] == [(2, 48, *grid)] * 4
    assert tuple(tokens.shape) == (2, 1 + math.prod(grid), 48)
    assert found_grid == grid
    assert network.side.patch_size == side
    last, before = network.side(given, states, 2)
    fine = tuple(min(2 * g, s // g * g) if 2 * g <= s else g for g, s in zip(side_grid, size, strict=True))
    for level in (last, before):
        assert tuple(level.masks.shape) == (2, queries, *fine)
        assert tuple(level.bias.shape) == (2, 4, queries, *side_grid)
    scores = [tuple(s.shape) for _, s in network.levels(given, 2)]
    assert scores == [(2, 3) if mode == "class_queries" else (2, 32, 4)] * 2
    assert tuple(network(given).shape) == (2, 3, *size)


@pytest.mark.parametrize("size", [(32, 48), (32, 32, 32)])
@pytest.mark.parametrize("hook", [None, "table", "class_key"])
def test_without_a_bias_every_token_is_the_class_token(size, hook) -> None:
    vit = backbone(size, (16,) * len(size))
    if hook:
        add_attention_bias(vit, hook, [s // 16 for s in size], 4, depth=2)
        for name, parameter in vit.named_parameters():
            if "table" in name:
                nn.init.normal_(parameter)
    network, given = san(size, (16,) * len(size), vit=vit).eval(), noise(2, 1, *size)
    _, tokens, grid = network.states(given)
    bias = torch.zeros(2, 4, 3, math.prod(grid))
    start = network.side.recognition.begin(tokens, math.prod(grid), 3)
    found = vit.norm(read_regions(vit.blocks[-1:], tokens, start, bias)[-1])
    wanted = vit(given)[0][:, :1].expand(-1, 3, -1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def regions(bias: Tensor, layers: int = 2, seed: int = 3) -> tuple[ViT, Tensor, Tensor, list[Tensor]]:
    """A transformer, tokens, starts, and what its blocks read."""
    vit = backbone(layers=4 * layers).eval()
    tokens, start = noise(2, 9, 48), noise(2, 3, 48) * 0.7
    return vit, tokens, start, read_regions(vit.blocks[-layers:], tokens, start, bias)


def test_the_side_stream_is_one_large_masked_attention() -> None:
    bias = 3 * noise(2, 4, 3, 8)
    vit, tokens, start, found = regions(bias)
    whole = torch.cat((tokens, start), 1)  # class token, 8 patches, 3 tokens
    mask = torch.full((2, 4, 12, 12), float("-inf"))
    mask[:, :, :9, :9] = 0
    mask[:, :, 9:, 1:9] = bias
    mask[:, :, range(9, 12), range(9, 12)] = 0
    for number, block in enumerate(vit.blocks[-2:]):
        q, k, v = block.attn.input_rearrange(block.attn.qkv(block.norm1(whole)))
        read = (q @ k.mT * block.attn.scale + mask).softmax(-1) @ v
        whole = whole + block.attn.out_proj(block.attn.out_rearrange(read))
        whole = whole + block.mlp(block.norm2(whole))
        torch.testing.assert_close(found[number], whole[:, 9:], atol=1e-5, rtol=1e-5)


def test_the_frozen_stream_does_not_see_the_tokens() -> None:
    seen: list[list[Tensor]] = []
    for bias in (torch.zeros(2, 4, 3, 8), 3 * noise(2, 4, 3, 8)):
        vit = backbone(layers=8).eval()
        seen.append([])
        hooks = [b.register_forward_hook(lambda m, i, o, s=seen[-1]: s.append(o)) for b in vit.blocks[-2:]]
        read_regions(vit.blocks[-2:], noise(2, 9, 48), noise(2, 3, 48), bias)
        [hook.remove() for hook in hooks]
    assert len(seen[0]) == 1  # the last block of the stream is not needed
    assert torch.equal(seen[0][0], seen[1][0])


def test_a_region_hides_what_is_outside() -> None:
    bias = torch.zeros(2, 4, 3, 8)
    bias[..., 4:] = -1e4
    vit, tokens, start, found = regions(bias)
    changed = tokens.clone()
    changed[:, 5:] += 1.0
    other = read_regions(vit.blocks[-2:], changed, start, bias)
    assert torch.equal(found[0], other[0])
    assert not torch.equal(found[1], other[1])  # patches mix in between
    changed[:, 1] += 1.0
    assert not torch.equal(read_regions(vit.blocks[-2:], changed, start, bias)[0], found[0])


def test_a_constant_shifts_weight_between_region_and_self() -> None:
    bias = noise(2, 4, 3, 8)
    vit, tokens, start, found = regions(bias)
    assert (read_regions(vit.blocks[-2:], tokens, start, bias + 1)[0] - found[0]).abs().max() > 1e-3


def test_tokens_do_not_see_each_other() -> None:
    bias = noise(2, 4, 3, 8)
    vit, tokens, start, found = regions(bias)
    order = [2, 0, 1]
    permuted = read_regions(vit.blocks[-2:], tokens, start[:, order], bias[:, :, order])
    torch.testing.assert_close(permuted[-1], found[-1][:, order], atol=1e-6, rtol=1e-6)
    changed = start.clone()
    changed[:, 1] += 1
    torch.testing.assert_close(
        read_regions(vit.blocks[-2:], tokens, changed, bias)[-1][:, [0, 2]], found[-1][:, [0, 2]], atol=1e-6, rtol=1e-6
    )


def test_fusion_adds_to_patches_only() -> None:
    network = san()
    grid, tokens = (4, 4, 4), noise(2, 3 + 64, 24)
    states = [noise(2, 48, 2, 2, 2)] * 4
    fused = network.side._fused(tokens, 1, states, grid)
    assert torch.equal(fused[:, :3], tokens[:, :3])
    assert (fused[:, 3:] - tokens[:, 3:]).abs().amin((0, 2)).min() >= 0
    assert (fused[:, 3:] != tokens[:, 3:]).all(2).all()


def test_states_are_the_residual_ones_of_quarters() -> None:
    vit = backbone(layers=8)
    network, given = san(vit=vit).eval(), noise(1, 1, 32, 32, 32)
    _, hidden = vit(given)
    states, tokens, _ = network.states(given)
    for state, wanted in zip(states[1:], (hidden[1], hidden[3], hidden[5]), strict=True):
        assert torch.equal(state.flatten(2).mT, wanted[:, 1:])
    assert torch.equal(states[0].flatten(2).mT, vit.patch_embedding(given))
    assert torch.equal(tokens, hidden[5])


@pytest.mark.parametrize("mode", ["class_queries", "matched"])
def test_the_backbone_neither_learns_nor_changes(mode) -> None:
    vit = ViT(1, (32,) * 3, (16,) * 3, 48, 96, 4, 4, classification=True, qkv_bias=True, dropout_rate=0.3)
    network = adapted(vit=vit, mode=mode, deep_supervision=True)
    before = state_of(network)
    network.train()
    assert not any(m.training for m in network.backbone.modules() if isinstance(m, nn.Dropout))
    optimiser = torch.optim.AdamW(mp.trainable_parameters(network), lr=1e-2)
    output = network(noise(2, 1, 32, 32, 32))
    loss = sum(o.square().mean() for o in (output if mode == "class_queries" else [output["pred_logits"]]))
    loss.backward()
    assert network.side.heads.bias.last.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in network.backbone.parameters())
    optimiser.step()
    changed = differing(before, state_of(network))
    assert changed
    assert all(name.startswith("side.") for name in changed)


def test_nothing_is_kept_for_the_shallow_blocks() -> None:
    network, given = adapted(pixel_upsample=0), noise(1, 1, 32, 32, 32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        network.states(given)
    assert not kept


def test_without_recognition_the_deeper_blocks_do_not_run() -> None:
    vit, calls = backbone(layers=8), []
    network = san(vit=vit, recognition=False).eval()
    for number, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda m, i, o, n=number: calls.append(n))
        block.attn.qkv.register_forward_hook(lambda m, i, o, n=number: calls.append(n))
    assert tuple(network(noise(1, 1, 32, 32, 32)).shape) == (1, 3, 32, 32, 32)
    assert set(calls) == set(range(6))
    assert not [name for name, _ in network.side.named_parameters() if "bias_affine" in name or "recognition" in name]
    assert network.side.heads.bias is None


@pytest.mark.parametrize("method", [mp.methods.LoRA(), mp.methods.FullFineTuning(), mp.methods.BiasOnly()], ids=str)
@pytest.mark.parametrize("recognition", [True, False])
def test_methods_in_the_backbone_train_what_a_gradient_reaches(method, recognition) -> None:
    network = san(recognition=recognition)
    mp.adapt(network, method, also_train=() if isinstance(method, mp.methods.FullFineTuning) else ["side"])
    network.train()(noise(1, 1, 32, 32, 32)).square().mean().backward()
    assert not [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert any(name.startswith("backbone.") for name, p in network.named_parameters() if p.requires_grad)
    beside = [name for name, p in network.side.named_parameters() if "deltas" in name]
    assert not beside


def test_another_number_of_classes_needs_another_network() -> None:
    with pytest.raises(ValueError, match="in more than one layer of its side network; build it for 5 classes"):
        mp.adapt(san(), mp.methods.HeadOnly(num_classes=5))
    assert mp.summary(mp.adapt(san(), mp.methods.HeadOnly())).trainable == mp.summary(adapted()).trainable


def test_parameters_of_the_reference_setting() -> None:
    vit = ViT(3, (320, 320), (16, 16), spatial_dims=2, classification=True, qkv_bias=True)
    options = {
        "mode": "matched",
        "num_queries": 100,
        "side_patch": (16, 16),
        "pixel_upsample": 0,
        "backbone_scale": 0.5,
    }
    network = mp.adapt(SAN(vit, 171, (640, 640), **options), [], also_train=["side"])
    counted = sum(p.numel() for n, p in network.side.named_parameters() if not n.startswith("recognition."))
    assert counted == 8_219_058
    assert mp.summary(network).trainable == counted + 172 * 768 + 1


def tensor_names(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(("preset", "width"), [("tiny", 144), ("small", 192), ("base", 240), ("large", 288)])
def test_presets_differ_in_width_and_give_scores(preset: str, width: int) -> None:
    network = SAN(backbone(), 3, (32, 32, 32), size=preset).eval()
    assert network.side.positions.shape[2] == width
    with torch.no_grad():
        assert network(noise(1, 1, 32, 32, 32)).shape == (1, 3, 32, 32, 32)


def test_the_file_holds_the_side_network_alone(tmp_path) -> None:
    network, given = adapted(start="cls+learned").eval(), noise(1, 1, 32, 32, 32)
    wanted = network(given)
    mp.save_adapter(network, tmp_path / "side.safetensors")
    names = tensor_names(tmp_path / "side.safetensors")
    assert all(name.startswith("side.") for name in names)
    assert {"side.recognition.vectors", "side.recognition.log_scale", "side.recognition.tokens"} <= names
    again = san(start="cls+learned")
    with torch.no_grad():
        for parameter in again.side.parameters():
            parameter.add_(1.0)
    mp.load_adapter(again, tmp_path / "side.safetensors")
    assert torch.equal(again.eval()(given), wanted)


def test_positions_can_be_trained_too(tmp_path) -> None:
    table = "backbone.patch_embedding.position_embeddings"
    network = mp.adapt(san(), [], also_train=["side", table])
    network(noise(1, 1, 32, 32, 32)).square().mean().backward()
    assert network.get_parameter(table).grad.abs().max() > 0
    mp.save_adapter(network, tmp_path / "side.safetensors")
    assert table in tensor_names(tmp_path / "side.safetensors")


@pytest.mark.parametrize(("size", "other"), [((32, 32, 32), (48, 32, 64)), ((32, 32), (64, 48))])
def test_images_of_another_size(size, other) -> None:
    network = san(size, (16,) * len(size)).eval()
    assert tuple(network(noise(1, 1, *other)).shape) == (1, 3, *other)


def test_deep_supervision_is_for_training() -> None:
    network, given = adapted(deep_supervision=True), noise(1, 1, 32, 32, 32)
    last, before = network.train()(given)
    torch.testing.assert_close(network.eval()(given), last, atol=1e-5, rtol=1e-5)
    assert (last - before).abs().max() > 1e-3
    label = torch.randint(0, 3, (1, 1, 32, 32, 32))
    loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    loss([last, before], label).backward()
    seen: list[int] = []
    network.side.heads.register_forward_hook(lambda m, i, o: seen.append(1))
    network.train()(given)
    assert len(seen) == 2


def test_a_checkpointed_side_network_is_the_same_and_keeps_less() -> None:
    found = []
    for use in (False, True):
        network = adapted(use_checkpoint=use, pixel_upsample=0).train()
        given = noise(1, 1, 32, 32, 32)
        network(given).square().mean().backward()
        gradients = [p.grad for p in mp.trainable_parameters(network)]
        cost = measure_step(network, lambda network=network, given=given: network(given).square().mean())
        found.append((gradients, cost.saved_bytes))
    for first, second in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)
    assert found[1][1] < 0.7 * found[0][1]


@pytest.mark.parametrize("mode", ["class_queries", "matched"])
def test_mixed_precision(mode) -> None:
    network, given = adapted(mode=mode).eval(), noise(1, 1, 32, 32, 32)
    wanted = network(given)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(given)
    assert (found.float() - wanted).abs().max() < 0.1 * (wanted.max() - wanted.min())


def test_a_larger_volume_by_windows() -> None:
    network, volume = san().eval(), noise(1, 1, 40, 48, 36)
    with torch.no_grad():
        found = SlidingWindowInferer((32, 32, 32), overlap=0.25)(volume, network)
    assert tuple(found.shape) == (1, 3, 40, 48, 36)
    assert found.isfinite().all()


def test_it_learns_a_sphere_and_a_cube() -> None:
    place = torch.stack(torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij"))
    label = torch.zeros(1, 1, 32, 32, 32)
    label[0, 0][(place - 10).square().sum(0) < 36] = 1
    label[0, 0, 18:28, 18:28, 16:26] = 2
    given = label / 2 + 0.1 * noise(1, 1, 32, 32, 32)
    network = adapted(pixel_upsample=2).train()
    optimiser = torch.optim.AdamW(mp.trainable_parameters(network), lr=1e-3)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    for _ in range(60):
        loss = criterion(network(given), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1
    found = F.one_hot(network.eval()(given).argmax(1), 3).movedim(-1, 1)
    wanted = F.one_hot(label[:, 0].long(), 3).movedim(-1, 1)
    assert (DiceMetric(include_background=False)(found, wanted) > 0.9).all()


@pytest.mark.parametrize("start", ["gap", "learned", "gap+learned"])
def test_a_backbone_without_a_class_token(start) -> None:
    network = san(vit=backbone(classification=False), start=start).eval()
    assert tuple(network(noise(1, 1, 32, 32, 32)).shape) == (1, 3, 32, 32, 32)
    assert san(vit=backbone(classification=False)).side.recognition.start == "gap+learned"


# what is refused


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: SAN(SwinUNETR(1, 2, feature_size=12), 2, (64, 64, 64)),
            TypeError,
            "SAN needs a MONAI ViT as its backbone, got SwinUNETR",
        ),
        (lambda: san(vit=backbone(layers=6)), ValueError, "must be a multiple of 4; this one has 6"),
        (
            lambda: SAN(backbone(), 2, (36, 32, 32), **TEST_SIZE),
            ValueError,
            r"patches of \(16, 16, 16\) do not divide an image of \(36, 32, 32\)",
        ),
        (
            lambda: san()(noise(1, 1, 32, 40, 32)),
            ValueError,
            r"\(16, 16, 16\) do not divide an image of \(32, 40, 32\)",
        ),
        (lambda: san(side_patch=(5, 8, 8)), ValueError, r"patches of \(5, 8, 8\) do not divide"),
        (lambda: san(mode="free"), ValueError, "mode must be one of class_queries, matched; got 'free'"),
        (
            lambda: SAN(backbone(), 3, (32,) * 3, size="huge"),
            ValueError,
            "size must be one of tiny, small, base, large; got 'huge'",
        ),
        (lambda: san(start="class"), ValueError, "start must be one of cls, gap, learned"),
        (
            lambda: san(vit=backbone(classification=False), start="cls"),
            ValueError,
            "start='cls' needs a class token, and this ViT has none; use 'gap\\+learned'",
        ),
        (lambda: san(mode="matched", recognition=False), ValueError, "mode='matched' needs recognition"),
        (lambda: san(num_queries=7), ValueError, "a query for each of 3 classes, not 7"),
        (lambda: san(mode="matched", num_queries=-3), ValueError, "num_queries must be positive, got -3"),
        (lambda: san(pixel_upsample=-1), ValueError, "pixel_upsample counts stages, 0 or more; got -1"),
        (
            lambda: san((48, 48), (16, 16), side_patch=(12, 12))(noise(1, 1, 80, 80)),
            ValueError,
            r"patches of \(12, 12\) do not divide an image of \(80, 80\)",
        ),
        (lambda: san(side_depth=2), ValueError, "at least 3 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
