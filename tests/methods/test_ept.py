"""EPT: what the published networks computed, and what the method promises. The published VPT is here too, with its cases."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNETR, SwinUNETR, ViT
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import monai_petl as mp
from monai_petl.core.deltas import deltas_of
from monai_petl.methods import (
    EPT,
    EPT_FORMS,
    VPT,
    LoRA,
    attention_gates,
    collapse_prompts,
    parameter_groups,
)
from monai_petl.methods.ept import IDENTITY_GATE, EPTDelta
from monai_petl.networks import ViTClassifier, load_backbone, vit_backbone
from monai_petl.networks.vit.parts import headless, resize_positions
from monai_petl.weights.inflation.files import set_eps
from tests.conftest import differing, frozen, state_of
from tests.weights.inflation.published import Case, deviation, image, load_cases, load_expected, tensor

CASES = load_cases("ept")
EXPECTED = load_expected("ept")
FORMS = sorted(EPT_FORMS)
WEIGHTS = Path(__file__).parents[2] / "../shared/weights/dinov2_vits14/model.safetensors"


# the published functions


def our_name(name: str) -> str:
    name = name.replace("attn.out.", "attn.out_proj.").replace("fc1", "linear1").replace("fc2", "linear2")
    return name.replace("patch_embed.", "patch_embedding.patch_embeddings.")


def published(case: Case, form: str) -> tuple[ViT, Tensor]:
    """The transformer of a case with its prompts, and its table of positions, class token first, which has a gradient."""
    config, given = case["config"], {r["name"].removeprefix(case["prefix"]): tensor(r) for r in case["tensors"]}
    patch, prompts = config["patch_size"], given.pop("prompt")
    vit = ViT(
        config["channels"],
        [patch * places for places in config["image_grid"]],
        (patch, patch),
        config["hidden_size"],
        config["mlp_dim"],
        config["num_blocks"],
        config["num_heads"],
        classification=True,
        spatial_dims=2,
        qkv_bias=True,
    )
    set_eps(headless(vit, ViT), config["norm_eps"])
    table = given.pop("pos_embed").requires_grad_()
    embedding, cls_token = vit.patch_embedding, given.pop("cls_token")
    del embedding.position_embeddings, vit.cls_token  # tensors that depend on the table take their place
    embedding.position_embeddings = resize_positions(table[:, 1:], config["stored_table_grid"], config["image_grid"])
    vit.cls_token = cls_token + table[:, :1]
    for name in [n for n in given if ".attn.query." in n]:
        thirds = [given.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        given[name.replace("query", "qkv")] = torch.cat(thirds)
    missing, unexpected = vit.load_state_dict({our_name(n): t for n, t in given.items()}, strict=False)
    assert not unexpected
    assert not [n for n in missing if "cross_attn" not in n]
    length, blocks = config["prompt_length"], config["prompted_blocks"]
    ours = EPT(length, "published", blocks, form) if config["variant"] == "EPT" else VPT(length, blocks=blocks)
    mp.adapt(vit, ours)
    with torch.no_grad():
        for (_, delta), rows in zip(prompted(vit), prompts, strict=True):
            next(delta.parameters()).copy_(rows)
    vit.requires_grad_(True)
    return vit.eval(), table


def prompted(vit: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    return [(layer, delta) for layer, delta in deltas_of(vit) if delta.tag in ("ept", "vpt")]


def outputs_of(case: Case, vit: ViT) -> dict[str, Tensor]:
    config, picture = case["config"], image(case)
    height, width = (places * config["patch_size"] for places in config["image_grid"])
    picture = F.pad(picture, (0, width - picture.shape[3], 0, height - picture.shape[2]))
    seen: list[Tensor] = []
    entering: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda m, i, o: seen.append(o[:, 0])) for b in vit.blocks]
    hooks.append(vit.blocks[0].register_forward_pre_hook(lambda m, args: entering.append(args[0])))
    tokens, _ = vit(picture)
    for hook in hooks:
        hook.remove()
    found = {"embedded": entering[0], "tokens": tokens, "class_token": tokens[:, 0]}
    found |= {f"class_token_after_block.{place}": token for place, token in enumerate(seen)}
    if config["variant"] == "EPT":
        found["kept_mass"] = attention_gates(vit, picture)
    return found


@pytest.mark.parametrize(
    ("case", "form"),
    [(c, f) for c in CASES for f in (FORMS if c["config"]["variant"] == "EPT" else ["sink"])],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_every_output_and_gradient_is_the_published_one(case: Case, form: str) -> None:
    vit, table = published(case, form)
    found = outputs_of(case, vit)
    names = {row["key"].removeprefix(case["prefix"].replace(".", "/")) for row in case["outputs"]}
    assert names <= set(found)
    for name in names - {"tokens"}:
        deviation(EXPECTED, case, name, found[name])
    compare_tokens(case, found["tokens"])
    gradients = case["gradients"]
    (found["class_token"] * tensor(gradients["probe"])).mean().backward()
    for row in gradients["wrt"]:
        name = row["tensor"].removeprefix(case["prefix"])
        if name == "prompt":
            value = torch.stack([next(delta.parameters()).grad for _, delta in prompted(vit)])
        elif name == "pos_embed":
            value = table.grad
        else:
            value = vit.get_parameter(name.replace("value", "qkv")).grad.chunk(3)[2]
        strided = value[tuple(slice(None, None, step) for step in row["stride"])].numpy()
        assert abs(strided - EXPECTED[row["key"]]).max() <= 5 * case["tolerance"] * row["max_abs"], row["key"]


def compare_tokens(case: Case, ours: Tensor) -> None:
    """Those of prompts, which the published VPT has behind the class token, are dropped by ours."""
    row = next(row for row in case["outputs"] if row["key"].endswith("/tokens"))
    dropped = row["shape"][1] - ours.shape[1]
    if not dropped:
        deviation(EXPECTED, case, "tokens", ours)
        return
    assert row["stride"] == [1, 1, 1]
    theirs = torch.from_numpy(EXPECTED[row["key"]])
    theirs = torch.cat((theirs[:, :1], theirs[:, 1 + dropped :]), 1)
    assert (ours - theirs).abs().max() <= case["tolerance"] * row["max_abs"]


# the acceptance list


def vit(size=(32, 32), patch: int = 8, layers: int = 3, **options) -> ViT:
    torch.manual_seed(0)
    options = {"spatial_dims": len(size), "classification": True, "qkv_bias": True, **options}
    return headless(ViT(3, size, (patch,) * len(size), 24, 48, layers, 3, **options), ViT)


def pictures(*size: int, count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def classifier(*methods, size=(32, 32), **options) -> ViTClassifier:
    network = ViTClassifier(vit(size), 3, size, pool="class", **options)
    return mp.adapt(network, list(methods), also_train=["head"]) if methods else network


def spread(network: nn.Module, deviation: float = 1.0) -> nn.Module:
    """Prompts that differ."""
    with torch.no_grad():
        for place, (_, delta) in enumerate(deltas_of(network)):
            delta.logits += deviation * torch.randn(delta.logits.shape, generator=torch.Generator().manual_seed(place))
    return network


def attention_inputs(dtype=torch.float32, columns: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 4, 17, 16, generator=generator, dtype=dtype)
    return q, k, v, torch.randn(17, columns, generator=generator, dtype=dtype)


def by_hand(q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, scale: float) -> Tensor:
    """The formula, one query at a time."""
    out = torch.empty_like(v)
    for i in range(q.shape[2]):
        logits = (q[:, :, i, None] * k).sum(-1) * scale
        exponentials = logits.exp()
        total = exponentials.sum(-1) + prompts[i].exp().sum()
        out[:, :, i] = (exponentials / total[..., None]).unsqueeze(-1).mul(v).sum(2)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_formula_in_value_and_gradient(form: str) -> None:
    inputs = [t.double().requires_grad_() for t in attention_inputs()]
    ours, wanted = EPT_FORMS[form](*inputs, 0.25), by_hand(*inputs, 0.25)
    torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=0)
    probe = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4), dtype=ours.dtype)
    for mine, theirs in zip(*(torch.autograd.grad(y, inputs, probe) for y in (ours, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    single = [t.float() for t in inputs]
    assert (EPT_FORMS[form](*single, 0.25) - EPT_FORMS["literal"](*single, 0.25)).abs().max() <= 1e-6


def test_the_gradient_of_the_offset_is_that_of_the_gate() -> None:
    q, k, v, prompts = attention_inputs(torch.float64, 1)
    prompts.requires_grad_()
    plain = F.scaled_dot_product_attention(q, k, v, scale=0.25)
    gate = torch.sigmoid((q @ k.mT * 0.25).logsumexp(-1) - prompts[:, 0])
    EPT_FORMS["sink"](q, k, v, prompts, 0.25).sum().backward()
    wanted = -(gate * (1 - gate) * plain.sum(-1)).sum((0, 1))
    torch.testing.assert_close(prompts.grad[:, 0], wanted.detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_collapsing_changes_nothing_but_the_size(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    network = spread(classifier(EPT(7))).eval().to(dtype)
    x = pictures(32, 32).to(dtype)
    before = network(x)
    assert collapse_prompts(network) is network
    assert (network(x) - before).abs().max() < tolerance
    assert [tuple(delta.logits.shape) for _, delta in deltas_of(network)] == 3 * [(17, 1)]
    path = mp.save_adapter(network, tmp_path / "ept.safetensors")
    fresh = mp.load_adapter(classifier().to(dtype), path).eval()
    with frozen(fresh, network):
        assert torch.equal(fresh(x), network(x))
    with pytest.raises(ValueError, match="'default' has no embedded prompts"):
        collapse_prompts(classifier(LoRA(rank=2)))


def test_what_is_kept_of_attention_is_the_gate() -> None:
    network = spread(classifier(EPT(4, 0.0))).eval()
    for block in network.backbone.blocks:
        block.attn.save_attn = True
    x = pictures(32, 32)
    gates = attention_gates(network, x)
    assert gates.shape == (3, 2, 3, 17)
    sums = torch.stack([block.attn.att_mat.sum(-1) for block in network.backbone.blocks])
    torch.testing.assert_close(gates, sums, atol=1e-6, rtol=0)
    assert gates.min() > 0
    assert gates.max() < 1


def test_it_starts_as_the_backbone_or_as_published() -> None:
    x, plain = pictures(32, 32), classifier().eval()
    assert (classifier(EPT()).eval()(x) - plain(x)).abs().max() < 1e-4
    assert (classifier(EPT(100, "published")).eval()(x) - plain(x)).abs().max() > 1e-3
    q, k, v = torch.zeros(3, 1, 1, 17, 8)
    v += 1
    logits = EPTDelta(17, 100, 0.0 + math.log(100)).logits
    torch.testing.assert_close(EPT_FORMS["sink"](q, k, v, logits, 1.0), torch.full_like(v, 17 / 117))
    start = EPTDelta(17, 5, math.log(17) - IDENTITY_GATE).logits
    assert float(EPT_FORMS["sink"](q, k, v, start.detach(), 1.0).min()) == pytest.approx(1, abs=1e-6)


BASE_COUNTS = {1: 2_364, 4: 9_456, 5: 11_820, 20: 47_280, 50: 118_200, 100: 236_400, 200: 472_800, 400: 945_600}
BASE_COUNTS[600] = 1_418_400


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the pre-trained weights are not at hand")
def test_it_starts_as_the_backbone_with_pre_trained_weights_too() -> None:
    sizes = {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6}
    network = ViTClassifier(vit_backbone(3, (224, 224), (14, 14), **sizes), 3, (224, 224), pool="class")
    load_backbone(network, WEIGHTS)
    x = F.interpolate(pictures(8, 8, count=1), (224, 224), mode="bicubic")
    with torch.no_grad():
        plain = network.eval().features(x)
        assert (mp.adapt(network, EPT()).eval().features(x) - plain).abs().max() < 1e-4 * plain.abs().max()


def test_columns_are_resized_as_one(tmp_path: Path) -> None:
    many = spread(classifier(EPT(6)), 3.0)
    one = collapse_prompts(copy.deepcopy(many))
    offsets = [
        torch.stack([delta.logits.logsumexp(1) for _, delta in deltas_of(network.resize((64, 48)))])
        for network in (many, one)
    ]
    torch.testing.assert_close(*offsets, atol=1e-5, rtol=1e-5)


def test_an_adapter_for_another_image_size_is_named_as_that(tmp_path: Path) -> None:
    path = mp.save_adapter(spread(classifier(EPT())), tmp_path / "ept.safetensors")
    with pytest.raises(ValueError, match=r"trained for images of another size: of its .* only the positions differ"):
        mp.load_adapter(classifier().resize((64, 64)), path)
    small = mp.load_adapter(classifier(), path).resize((64, 64)).eval()
    assert small(pictures(64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "mlp", "counts"),
    [
        (768, 12, 12, 3072, BASE_COUNTS),
        (1024, 24, 16, 4096, {100: 472_800, 600: 2_836_800, 1: 4_728}),
    ],
    ids=["ViT-B", "ViT-L"],
)
def test_counts(width: int, layers: int, heads: int, mlp: int, counts: dict[int, int]) -> None:
    with torch.device("meta"):
        backbone = ViT(3, (224, 224), (16, 16), width, mlp, layers, heads, spatial_dims=2, classification=True)
    for columns, count in counts.items():
        network = mp.adapt(copy.deepcopy(backbone), EPT(columns))
        assert mp.summary(network).trainable == count
        shallow = mp.adapt(copy.deepcopy(backbone), EPT(columns, blocks=[0]))
        assert mp.summary(shallow).trainable == 197 * columns


def test_only_prompts_and_head_learn() -> None:
    with torch.device("meta"):
        backbone = ViT(3, (224, 224), (16, 16), spatial_dims=2, classification=True, qkv_bias=True)
        network = ViTClassifier(backbone, 19, (224, 224), pool="class")
    mp.adapt(network, EPT(100), also_train=["head"])
    assert mp.summary(network).trainable == 236_400 + 14_611
    network = classifier(EPT(3))
    before = state_of(network)
    learn(network, steps=2)
    assert differing(before, state_of(network)) == {n for n, p in network.named_parameters() if p.requires_grad}


def learn(network: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(mp.trainable_parameters(network), lr=1e-2)
    for _ in range(steps):
        network(pictures(32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_last_rows_get_a_gradient_only_where_something_reads_them() -> None:
    network = spread(classifier(EPT(2)))
    network(pictures(32, 32)).square().sum().backward()
    *others, last = [delta.logits.grad for _, delta in deltas_of(network)]
    assert all((gradient != 0).all() for gradient in others)
    assert (last[0] != 0).all()
    assert (last[1:] == 0).all()
    whole = spread(mp.adapt(vit(), EPT(2)))
    whole(pictures(32, 32))[0].square().sum().backward()
    assert all((delta.logits.grad != 0).all() for _, delta in deltas_of(whole))


def test_columns_are_one_column_at_a_smaller_rate_under_sgd() -> None:
    columns, rate = 8, 40.0
    curves = []
    for count, lr, start in ((columns, rate, 0.0), (1, rate / columns, math.log(columns))):
        network = mp.adapt(classifier(), EPT(count, math.log(columns) if count > 1 else start)).double()
        optimizer = torch.optim.SGD(mp.trainable_parameters(network), lr=lr, momentum=0.9)
        curve = []
        for _ in range(30):
            loss = network(pictures(32, 32).double()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve, dtype=torch.float64))
    assert (curves[0][0] - curves[0][-1]).abs() > 1e-6
    torch.testing.assert_close(*curves, atol=1e-9, rtol=0)


def test_under_adam_columns_are_not_one_column_at_a_smaller_rate() -> None:
    moved = []
    for count, rate in ((8, 0.1), (1, 0.1 / 8)):
        network = classifier(EPT(count, math.log(8))).double()
        optimizer = torch.optim.Adam([delta.logits for _, delta in deltas_of(network)], lr=rate)
        network(pictures(32, 32).double()).square().mean().backward()
        optimizer.step()
        moved.append(torch.stack([delta.logits.detach().logsumexp(1) for _, delta in deltas_of(network)]) - math.log(8))
    assert (
        float(moved[0].abs().mean() / moved[1].abs().mean()) > 4
    )  # a step is as long as the rate, whatever the gradient


def test_any_blocks_or_none() -> None:
    network = mp.adapt(classifier(), EPT(blocks=[2, 0]), also_train=["head"])
    places = [name for name, _ in network.named_parameters() if "logits" in name]
    assert [name.split(".")[2] for name in places] == ["0", "2"]
    every = spread(classifier(EPT(1, 0.0)))
    first, left_out, last = (delta for _, delta in deltas_of(every))
    some = classifier(EPT(1, 0.0, blocks=[2, 0]))
    with torch.no_grad():
        for (_, delta), source in zip(deltas_of(some), (first, last), strict=True):
            delta.logits.copy_(source.logits)
    with_all = every.eval()(pictures(32, 32))
    left_out.active = False
    torch.testing.assert_close(some.eval()(pictures(32, 32)), every(pictures(32, 32)))
    assert not torch.allclose(with_all, every(pictures(32, 32)), atol=1e-3)
    none = mp.adapt(classifier(), EPT(blocks=[]), also_train=["head"])
    assert mp.summary(none).trainable == sum(p.numel() for p in none.head.parameters())
    assert torch.equal(none.eval()(pictures(32, 32)), classifier().eval()(pictures(32, 32)))


def test_another_image_size_keeps_the_gates() -> None:
    keys = 1 + 28 * 28
    network = spread(classifier(EPT(2, math.log(keys)), size=(224, 224)), 0.1).eval()  # gates near a half tell most
    x, y = (torch.full((1, 3, size, size), 0.5) for size in (224, 384))
    before = attention_gates(network, x)
    with pytest.raises(ValueError, match=r"built for images of \(224, 224\), got \[384, 384\]"):
        network(y)
    assert network.resize((384, 384)) is network
    assert [tuple(delta.logits.shape) for _, delta in deltas_of(network)] == 3 * [(1 + 48 * 48, 2)]
    after = attention_gates(network, y)
    assert 0.3 < float(before.mean()) < 0.7
    torch.testing.assert_close(after.mean((1, 2, 3)), before.mean((1, 2, 3)), atol=0, rtol=0.05)
    assert network(y).shape == (1, 3)
    learn_at = network.train()(y).sum()
    learn_at.backward()
    assert all(delta.logits.grad is not None for _, delta in deltas_of(network))
    with pytest.raises(ValueError, match="do not divide"):
        network.resize((100, 100))
    trained = mp.adapt(classifier(), [], also_train=["head", "backbone.patch_embedding.position_embeddings"])
    with pytest.raises(ValueError, match="'default' trains the positions"):
        trained.resize((64, 64))


@pytest.mark.parametrize("axes", [2, 3])
def test_prompts_keep_their_places_at_another_size(axes: int) -> None:
    """c is a ramp along each axis, of another slope for each: linear in between, constant beyond the outermost centres."""
    delta = EPTDelta(1 + 4**axes, 1, 0.0)
    grids = torch.meshgrid(*(torch.arange(4.0) for _ in range(axes)), indexing="ij")
    with torch.no_grad():
        delta.logits[0] = -5.0  # the class token's
        delta.logits[1:, 0] = sum(10**axis * grid for axis, grid in enumerate(grids)).flatten()
    delta.resize(axes * (4,), axes * (8,))
    between = ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3)
    wanted = sum(10**axis * grid for axis, grid in enumerate(torch.meshgrid(*axes * (between,), indexing="ij")))
    more_keys = math.log((1 + 8**axes) / (1 + 4**axes))
    torch.testing.assert_close(delta.logits[1:, 0] - more_keys, wanted.flatten(), atol=1e-4, rtol=1e-5)
    assert delta.logits[0].item() == pytest.approx(-5 + more_keys)


def test_the_image_size_that_a_bare_transformer_was_built_for_is_named() -> None:
    network = mp.adapt(vit(), EPT())
    attention = network.blocks[0].attn
    with pytest.raises(ValueError, match=r"prompts for 17 tokens, and attention got 5; .*no tokens of VPT"):
        attention(torch.randn(1, 5, 24))


def test_prompts_are_the_same_for_all_images_and_heads() -> None:
    network = spread(classifier(EPT(3, 0.0))).eval()
    x = pictures(32, 32, count=4)
    assert float((network(x) - classifier().eval()(x)).abs().max()) > 1e-3  # the prompts count
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(network(x)[order], network(x[order]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(network(x[1:2]), network(x)[1:2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [80.0, -80.0])
def test_mixed_precision_reaches_both_limits(form: str, precision: torch.dtype, offset: float) -> None:
    network = mp.adapt(classifier(), EPT(1, offset, form=form)).eval()
    limit = classifier().eval()
    if offset > 0:  # the gate is shut: of attention the bias of its projection is left
        for block in limit.backbone.blocks:
            nn.init.zeros_(block.attn.out_proj.weight)
    with torch.autocast("cpu", precision):
        scores, wanted = network(pictures(32, 32)), limit(pictures(32, 32))
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores, wanted, atol=0.05, rtol=0.05)
    gates = attention_gates(network, pictures(32, 32))
    assert float((gates - float(offset < 0)).abs().max()) < 1e-6


def test_volumes_through_unetr() -> None:
    torch.manual_seed(0)
    network = UNETR(1, 2, (96, 96, 96), 4, 48, 96, 3)
    mp.adapt(network, EPT(init=0.0), also_train=["decoder*", "out"])
    deltas = [delta for _, delta in deltas_of(network)]
    assert [tuple(delta.logits.shape) for delta in deltas] == 12 * [(216, 1)]
    x = torch.randn(1, 1, 96, 96, 96)
    optimizer = torch.optim.AdamW(parameter_groups(network, ["decoder*", "out"], 1e-3, 0.1, 1e-3), eps=1e-16)
    network(x).square().mean().backward()
    assert all((delta.logits.grad != 0).all() for delta in deltas)  # of all rows: a decoder reads every patch
    optimizer.step()
    assert all((delta.logits.detach().abs() > 0.01).all() for delta in deltas)
    with torch.no_grad():
        whole = sliding_window_inference(torch.randn(1, 1, 96, 96, 100), (96, 96, 96), 1, network.eval(), overlap=0)
    assert whole.shape == (1, 2, 96, 96, 100)


def test_the_file_is_small_and_holds_prompts_and_head(tmp_path: Path) -> None:
    backbone = ViT(3, (224, 224), (16, 16), spatial_dims=2, classification=True, qkv_bias=True)
    network = ViTClassifier(backbone, 19, (224, 224), pool="class")
    plain = copy.deepcopy(network)
    mp.adapt(network, EPT(), also_train=["head"])
    spread(network)
    path = mp.save_adapter(network, tmp_path / "ept.safetensors")
    stored = load_file(path)
    assert {name.rsplit(".", 1)[-1] for name in stored} == {"ept_logits", "weight", "bias"}
    assert path.stat().st_size < 100_000
    assert len(stored) == 12 + 2
    mp.load_adapter(plain, path)
    assert not differing(state_of(network), state_of(plain))


def test_two_adapters_add_their_columns() -> None:
    network = spread(mp.adapt(classifier(), EPT(2), name="first"))
    mp.adapt(network, EPT(3, 0.0), name="second")
    one = mp.adapt(classifier(), EPT(5))
    with torch.no_grad():
        for block, target in zip(network.backbone.blocks, one.backbone.blocks, strict=True):
            parts = [delta.logits for delta in block.attn.deltas.values()]
            next(iter(target.attn.deltas.values())).logits.copy_(torch.cat(parts, 1))
    x = pictures(32, 32)
    torch.testing.assert_close(network.eval()(x), one.eval()(x), atol=1e-6, rtol=1e-5)
    with mp.disabled(network, "second"):
        alone = spread(mp.adapt(classifier(), EPT(2))).eval()
        torch.testing.assert_close(network(x), alone(x), atol=1e-6, rtol=1e-5)
    with mp.disabled(network):
        assert torch.equal(network(x), classifier().eval()(x))


@pytest.mark.parametrize(("eps", "learns"), [(1e-16, True), (1e-8, False)], ids=["of the bundle", "of torch"])
def test_from_an_open_gate_it_learns_what_frozen_prompts_cannot(eps: float, learns: bool) -> None:
    """Attention of one of two classes is too strong by a factor; nothing but the gates is trained, from the default start."""
    teacher, student = classifier().eval(), classifier(EPT(), size=(32, 32))
    for block in teacher.backbone.blocks:
        block.attn.out_proj.weight.data *= 0.5
    student.head.requires_grad_(False)
    optimizer = torch.optim.AdamW([delta.logits for _, delta in deltas_of(student)], lr=0.1, weight_decay=0, eps=eps)
    x = pictures(32, 32, count=16)
    with torch.no_grad():
        wanted = torch.cat((classifier().eval()(x[:4]), teacher(x[4:])))
    start, losses, moved = [d.logits.detach().clone() for _, d in deltas_of(student)], [], []
    for _ in range(300):
        loss = (student(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        moved.append(
            max(float((d.logits - s).abs().max()) for (_, d), s in zip(deltas_of(student), start, strict=True))
        )
    if learns:
        assert moved[9] == pytest.approx(10 * 0.1, rel=0.2)  # a step is as long as the rate
        assert losses[-1] < 0.7 * losses[0]  # losses[0] is that of frozen prompts
    else:
        assert moved[9] < 0.01
        assert losses[-1] > 0.7 * losses[0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EPT(0), ValueError, "num_columns must be a whole number of at least 1, got 0"),
        (lambda: EPT(init="zeros"), ValueError, "init must be 'identity', 'published' or a number, got 'zeros'"),
        (lambda: EPT(form="fast"), ValueError, "form must be one of sink, maskless, gate, literal; got 'fast'"),
        (lambda: EPT(blocks=[0, 7]), ValueError, r"different numbers of blocks, 0 to 2; got \[0, 7\]"),
        (lambda: VPT(blocks=[0, 0]), ValueError, r"different numbers of blocks, 0 to 2; got \[0, 0\]"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        mp.adapt(vit(), make())


def test_networks_and_actions_that_have_no_place_for_it_are_refused() -> None:
    with pytest.raises(TypeError, match=r"EPT needs a vision transformer .* got SwinUNETR. Use LoRA"):
        mp.adapt(SwinUNETR(1, 2, feature_size=12, spatial_dims=2), EPT())
    causal = vit()
    causal.blocks[1].attn.causal = True
    with pytest.raises(
        TypeError, match="cannot work at block 1 of ViT: its attention has relative positions or a causal"
    ):
        mp.adapt(causal, EPT())
    with pytest.raises(TypeError, match="cannot be merged"):
        mp.merge(mp.adapt(vit(), EPT()))
    with pytest.raises(ValueError, match="no use for an attention mask"):
        mp.adapt(vit(), EPT()).blocks[0].attn(torch.randn(1, 17, 24), attn_mask=torch.ones(1, 17))
    with pytest.raises(ValueError, match="no embedded prompts that are switched on"):
        attention_gates(classifier(), pictures(32, 32))
