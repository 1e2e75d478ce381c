"""FPT and FPT+: what the published networks computed, and what they promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from monai.metrics import ROCAUCMetric
from monai.networks.nets import SwinUNETR, ViT
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import monai_petl as mp
from monai_petl.core.summary import saved_activation_bytes
from monai_petl.networks import FPT
from monai_petl.networks.fpt.frozen_taps import kept_tokens, read_taps, trained_size
from monai_petl.networks.vit.parts import resize_positions
from monai_petl.weights.inflation.files import set_eps
from tests.conftest import differing, state_of
from tests.weights.inflation.published import Case, deviation, image, load_cases, load_expected, tensor
from tests.weights.inflation.sources import timm_vit

CASES = load_cases("fpt")
EXPECTED = load_expected("fpt")


# the published function


def our_state(case: Case) -> dict[str, Tensor]:
    given = {row["name"].removeprefix(case["prefix"]): tensor(row) for row in case["tensors"]}
    positions = given.pop("frozen.pos_embed")
    state = {
        "backbone.cls_token": given.pop("frozen.cls_token") + positions[:, :1],
        "backbone.patch_embedding.position_embeddings": positions[:, 1:],
    }
    for name in [n for n in given if ".attn.query." in n]:
        thirds = [given.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[our_name(name.replace("query", "qkv"))] = torch.cat(thirds)
    return state | {our_name(name): value for name, value in given.items()}


def our_name(name: str) -> str:
    name = name.replace("attn.out.", "attn.out_proj.").replace("fc1", "linear1").replace("fc2", "linear2")
    name = name.replace("frozen.patch_embed.", "backbone.patch_embedding.patch_embeddings.").replace(
        "frozen.", "backbone."
    )
    name = name.replace("side.patch_embed.", "side.patch_embedding.").replace("side.pos_embed", "side.positions")
    name = name.replace("fusion.in_proj.", "fusion.enter.").replace("fusion.norm.", "fusion.enter.")
    return f"side.{name}" if name.startswith("fusion.") else name


def published(case: Case, **options) -> FPT:
    config, patch = case["config"], case["config"]["patch_size"]
    size = [patch * g for g in config["frozen_table_grid"]]
    vit = ViT(
        config["channels"],
        size,
        (patch, patch),
        config["frozen_hidden_size"],
        config["frozen_mlp"],
        config["frozen_blocks"],
        config["frozen_heads"],
        classification=True,
        spatial_dims=2,
        qkv_bias=True,
    )
    set_eps(vit, config["frozen_norm_eps"])
    network = FPT(
        vit,
        config["classes"],
        config["frozen_image_hw"],
        variant="fpt" if config["variant"] == "FPT" else "fpt_plus",
        side_size=[patch * g for g in config["side_table_grid"]],
        layers=config["tapped_blocks"],
        num_prompts=config["prompts_per_layer"],
        token_ratio=config["token_ratio"],
        score="class_token" if "class" in config["importance"] else "global",
        side_width=config["side_hidden_size"],
        side_heads=config["side_heads"],
        **options,
    )
    missing, unexpected = network.load_state_dict(our_state(case), strict=False)
    assert not unexpected
    assert not [name for name in missing if "cross_attn" not in name and not name.startswith("backbone.norm.")]
    assert sum(p.numel() for p in network.side.parameters()) == config["learnable_parameters"]
    return network.eval()


def outputs_of(case: Case, network: FPT) -> dict[str, Tensor]:
    config = case["config"]
    taps, side = network.taps(image(case, "frozen")), image(case, "side")
    found = {"frozen.score": taps.scores, "frozen.index": taps.index.to(torch.int16)}
    found |= {"frozen.key": taps.keys, "frozen.value": taps.values}
    found["fusion"] = network.side.fusion(taps.keys, taps.values)
    table, grid = config["frozen_table_grid"], [s // config["patch_size"] for s in config["frozen_image_hw"]]
    positions = next(tensor(r) for r in case["tensors"] if r["name"].endswith("frozen.pos_embed"))
    patches = network.backbone.patch_embedding.position_embeddings
    found["frozen.pos_embed_used"] = torch.cat((positions[:, :1], resize_positions(patches, table, grid, 0.1)), 1)
    tokens: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda m, i, o: tokens.append(o[:, 0])) for b in network.side.blocks]
    found["logits"] = network.side(side, taps.keys.movedim(0, 1), taps.values.movedim(0, 1))
    [hook.remove() for hook in hooks]
    found["side.class_tokens"] = torch.stack(tokens)
    if any(row["key"].endswith("side.pos_embed_used") for row in case["outputs"]):
        grid = [s // config["patch_size"] for s in config["side_image_hw"]]
        resized = resize_positions(network.side.positions[:, 1:], config["side_table_grid"], grid, 0.1)
        found["side.pos_embed_used"] = torch.cat((network.side.positions[:, :1], resized), 1)
    if config["variant"] == "FPT":
        found["fusion_without_residual"] = published(case, residual="none").side.fusion(taps.keys, taps.values)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_output_and_gradient_is_the_published_one(case: Case) -> None:
    network = published(case)
    found = outputs_of(case, network)
    assert {f"{case['name']}/{name}" for name in found} == {row["key"] for row in case["outputs"]}
    index = found.pop("frozen.index")
    assert torch.equal(index, torch.from_numpy(EXPECTED[f"{case['name']}/frozen.index"]))
    for name, value in found.items():
        deviation(EXPECTED, case, name, value)
    gradients = case["gradients"]
    (found["logits"] * tensor(gradients["probe"])).mean().backward()
    for row in gradients["wrt"]:
        name = our_name(row["tensor"].removeprefix(case["prefix"]))
        value = gradient(network, name).reshape(row["shape"])
        strided = value[tuple(slice(None, None, step) for step in row["stride"])].numpy()
        assert abs(strided - EXPECTED[row["key"]]).max() <= 5 * case["tolerance"] * row["max_abs"], row["key"]


def gradient(network: FPT, name: str) -> Tensor:
    for place, part in enumerate(("query", "key", "value")):
        if f".attn.{part}." in name:
            return network.get_parameter(name.replace(part, "qkv")).grad.chunk(3)[place]
    return network.get_parameter(name).grad


# the acceptance list


def vit(size=(48, 48), layers: int = 4, channels: int = 3, **options) -> ViT:
    torch.manual_seed(0)
    patch = (16,) * len(size)
    options = {"classification": True, "spatial_dims": len(size), "qkv_bias": True, **options}
    return ViT(channels, size, patch, 48, 96, layers, 3, **options)


SMALL = {"side_size": (32, 32), "side_width": 24, "side_heads": 3, "num_prompts": 4}


def fpt(backbone: ViT | None = None, size=(96, 96), classes: int = 3, **options) -> FPT:
    backbone = backbone or vit()
    torch.manual_seed(1)
    network = mp.adapt(FPT(backbone, classes, size, **{**SMALL, **options}), [], also_train=["side"])
    with torch.no_grad():
        network.side.fusion.prompts.normal_()
        network.side.head.weight.normal_()
    return network


def noise(*size: int, seed: int = 2) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


COUNTS = {
    "fpt": (1_602_050, 1_602_147, 1_602_341, 1_602_535),
    "fpt_plus": (900_674, 900_771, 900_965, 901_159),
}


@pytest.mark.parametrize("variant", COUNTS)
def test_learnable_counts_and_their_share(variant) -> None:
    counts = COUNTS[variant]
    backbone = ViT(3, (384, 384), (16, 16), spatial_dims=2, classification=True, qkv_bias=True)
    for classes, count in zip((2, 3, 5, 7), counts, strict=True):
        network = mp.adapt(FPT(backbone, classes, (512, 512), variant=variant), [], also_train=["side"])
        assert mp.summary(network).trainable == count
    frozen = sum(p.numel() for n, p in backbone.named_parameters() if "cross_attn" not in n)
    assert frozen == 86_090_496 - 768  # the class token holds its own position
    share = counts[2] / (counts[2] + 86_859_496)
    assert round(100 * share, 2) == {"fpt": 1.81, "fpt_plus": 1.03}[variant]


@pytest.mark.parametrize(("size", "tokens", "kept"), [(384, 577, 115), (512, 1025, 205), (1024, 4097, 819)])
def test_kept_tokens(size, tokens, kept) -> None:
    assert 1 + (size // 16) ** 2 == tokens
    assert kept_tokens(tokens, 0.2) == kept
    network = FPT(vit(), 2, (size, size), **SMALL)
    assert network.states_shape() == (2, 3, kept, 16)
    assert kept_tokens(50, 0.58) == 28


@pytest.mark.parametrize(("variant", "layers"), [("fpt", 12), ("fpt_plus", 6)])
def test_shapes_at_512_pixels_of_the_published_transformer(variant, layers) -> None:
    with torch.device("meta"):
        backbone = ViT(3, (384, 384), (16, 16), spatial_dims=2, classification=True, qkv_bias=True)
        network = FPT(backbone, 2, (512, 512), variant=variant)
        taps = network.taps(torch.empty(2, 3, 512, 512))
        keys, values = network.encode(torch.empty(2, 3, 512, 512))
    assert taps.keys.shape == taps.values.shape == (layers, 2, 12, 205, 64)
    assert taps.index.shape == (layers, 2, 12, 205)
    assert taps.scores.shape == (layers, 2, 12, 1025)
    assert keys.shape == values.shape == (2, *network.states_shape()) == (2, layers, 12, 205, 64)


@pytest.mark.parametrize(
    ("size", "tokens", "kept", "megabytes"), [((128, 128, 128), 513, 102, 3.8), ((192, 192, 96), 865, 173, 6.4)]
)
def test_shapes_and_bytes_of_volumes(size, tokens, kept, megabytes) -> None:
    """In float32, of the last six blocks of a ViT-B."""
    with torch.device("meta"):
        backbone = ViT(1, (128, 128, 128), (16, 16, 16), spatial_dims=3, classification=True, qkv_bias=True)
        network = FPT(backbone, 2, size)
        taps = network.taps(torch.empty(1, 1, *size))
    assert taps.scores.shape == (6, 1, 12, tokens)
    assert taps.keys[:, 0].shape == network.states_shape() == (6, 12, kept, 64)
    assert round(2 * 4 * math.prod(network.states_shape()) / 1e6, 1) == megabytes
    assert network.side_size == tuple(extent // 2 for extent in size)


def test_states_have_the_shape_that_is_announced() -> None:
    network, given = fpt(), noise(2, 3, 96, 96)
    keys, values = network.encode(given)
    assert keys.shape == values.shape == (2, *network.states_shape())


def test_the_taps_of_fpt_plus_are_the_last_half_of_those_of_fpt() -> None:
    backbone, given = vit(), noise(2, 3, 96, 96)
    every, half = (fpt(backbone, variant=v).taps(given) for v in ("fpt", "fpt_plus"))
    assert torch.equal(every.keys[2:], half.keys)
    assert torch.equal(every.values[2:], half.values)
    assert torch.equal(every.index[2:], half.index)


@pytest.mark.parametrize("score", ["global", "class_token"])
def test_selection_is_that_of_a_loop_over_the_attention_matrix(score) -> None:
    backbone, given = vit(save_attn=True), noise(2, 3, 48, 48)
    taps = read_taps(backbone, given, range(4), (48, 48), 0.4, score)
    _, hidden = backbone(given)
    for number, block in enumerate(backbone.blocks):
        weights = block.attn.att_mat  # (B, heads, N, N), of the block's own pass
        wanted = weights.mean(2) if score == "global" else weights[:, :, 0]
        torch.testing.assert_close(taps.scores[number], wanted, atol=1e-6, rtol=1e-5)
        before = (
            hidden[number - 1]
            if number
            else torch.cat((backbone.cls_token.expand(2, -1, -1), backbone.patch_embedding(given)), 1)
        )
        _, keys, values = block.attn.input_rearrange(block.attn.qkv(block.norm1(before)))
        for b in range(2):
            for head in range(3):
                order = sorted(range(10), key=lambda n: -float(wanted[b, head, n]))
                index = taps.index[number, b, head]
                assert index.tolist() == sorted(order[:4])
                torch.testing.assert_close(taps.keys[number, b, head], keys[b, head, index], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(taps.values[number, b, head], values[b, head, index], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(taps.scores.sum(-1), torch.ones(4, 2, 3))
    assert not torch.equal(taps.index[:, :, 0], taps.index[:, :, 1])
    with_class_token = (taps.index == 0).any(-1)
    assert with_class_token.any()
    assert not with_class_token.all()


def test_scores_by_chunks_are_those_of_the_whole(monkeypatch) -> None:
    backbone, given = vit(), noise(2, 3, 96, 96)
    whole = read_taps(backbone, given, range(4), (48, 48))
    monkeypatch.setattr("monai_petl.networks.fpt.frozen_taps.CHUNK", 3 * 37 * 5)
    chunks = read_taps(backbone, given, range(4), (48, 48))
    torch.testing.assert_close(chunks.scores, whole.scores, atol=1e-6, rtol=0)
    assert torch.equal(chunks.index, whole.index)
    torch.testing.assert_close(chunks.keys, whole.keys, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
        made = function(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(made) if isinstance(tensor, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (3,)], ids=["all blocks tapped", "one"])
def test_all_attention_weights_of_a_large_image_are_never_there_at_once(layers, monkeypatch) -> None:
    monkeypatch.setattr("monai_petl.networks.fpt.frozen_taps.CHUNK", 3 * 257 * 20)
    backbone, given = vit(channels=1), noise(1, 1, 256, 256)
    with Largest() as largest:
        read_taps(backbone, given, layers, (48, 48))
    assert 257 * 3 * 48 <= largest.numbers < 3 * 257 * 257


def test_positions_are_resized_by_the_factor_not_to_the_size() -> None:
    table = 0.024 * noise(1, 576, 32)
    factor, explicit = (resize_positions(table, (24, 24), (32, 32), offset) for offset in (0.1, 0.0))
    assert factor.shape == explicit.shape == (1, 1024, 32)
    assert (factor - explicit).abs().max() > 0.01
    wanted = F.interpolate(table.mT.view(1, 32, 24, 24), scale_factor=32.1 / 24, mode="bicubic").flatten(2).mT
    torch.testing.assert_close(factor, wanted)
    assert resize_positions(table, (24, 24), (24, 24), 0.1) is table


def test_the_order_of_kept_tokens_does_not_matter_but_their_pairs_do() -> None:
    network, given = fpt().eval(), noise(2, 3, 32, 32)
    keys, values = network.encode(noise(2, 3, 96, 96))
    order = torch.randperm(keys.shape[3])
    wanted = network(given, keys, values)
    torch.testing.assert_close(network(given, keys[..., order, :], values[..., order, :]), wanted, atol=1e-5, rtol=1e-5)
    assert (network(given, keys, values[..., order, :]) - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("variant", ["fpt", "fpt_plus"])
def test_the_backbone_neither_learns_nor_changes_and_all_else_does(variant) -> None:
    network = fpt(vit(dropout_rate=0.2), variant=variant).train()
    before = state_of(network)
    optimiser = torch.optim.AdamW(mp.trainable_parameters(network), lr=1e-2)
    F.cross_entropy(network(noise(2, 3, 96, 96)), torch.tensor([0, 2])).backward()
    assert all(p.grad is None for p in network.backbone.parameters())
    for name, parameter in network.side.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    optimiser.step()
    assert all(name.startswith("side.") for name in differing(before, state_of(network)))


def test_stored_features_give_the_same_scores() -> None:
    network, given = fpt().eval(), noise(2, 3, 96, 96)
    wanted = network(given)
    small = F.interpolate(given, (32, 32), mode="bilinear", antialias=True)
    keys, values = network.encode(given)
    assert torch.equal(network(small, keys, values), wanted)
    assert torch.equal(network(small, source=given), wanted)
    half = network(small, keys.half(), values.half())
    assert (half - wanted).abs().max() <= 0.01 * (wanted.max() - wanted.min())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_the_same_tokens(dtype) -> None:
    network, given = fpt().eval(), noise(2, 3, 96, 96)
    wanted, scores = network.taps(given), network(given)
    with torch.autocast("cpu", dtype):
        found = network.taps(given)
        rough = network(given)
    assert torch.equal(found.index, wanted.index)
    assert torch.equal(found.keys, wanted.keys)
    assert (rough - scores).abs().max() < 0.05 * (scores.max() - scores.min())


def test_prompts_are_dropped_after_every_block() -> None:
    network, given, entering, leaving, prompts = fpt(variant="fpt").eval(), noise(2, 3, 96, 96), [], [], []
    network.side.fusion.register_forward_hook(lambda m, i, o: prompts.extend(o))
    for block in network.side.blocks:
        block.register_forward_pre_hook(lambda m, i: entering.append(i[0]))
        block.register_forward_hook(lambda m, i, o: leaving.append(o))
    network(given)
    before = [network.side.embed(network.at_side_size(given)), *(tokens[:, :5] for tokens in leaving[:-1])]
    assert len(entering) == len(prompts) == 4
    for tokens, left, prompt in zip(entering, before, prompts, strict=True):
        assert torch.equal(tokens, torch.cat((left, prompt), 1))  # of the prompts before nothing is left


def test_dropout_is_all_that_is_random() -> None:
    network, given = fpt(), noise(2, 3, 96, 96)
    network.eval()
    assert torch.equal(network(given), network(given))
    network.train()
    assert not torch.equal(network(given), network(given))
    network.side.fusion.dropout.p = 0.0
    torch.testing.assert_close(network(given), network.eval()(given))


def test_where_the_residual_is() -> None:
    for variant, residual in (("fpt", "inside"), ("fpt", "outside"), ("fpt_plus", "inside")):
        network = fpt(variant=variant, residual=residual).eval()
        fusion = network.side.fusion
        nn.init.zeros_(fusion.out_proj.weight)
        nn.init.zeros_(fusion.out_proj.bias)
        keys, values = network.encode(noise(2, 3, 96, 96))
        found = fusion(keys.movedim(0, 1), values.movedim(0, 1))
        wanted = fusion.prompts if variant == "fpt" else torch.zeros(1)
        assert torch.equal(found, wanted.expand_as(found))


def test_attention_of_fpt_plus_starts_uniform() -> None:
    network = FPT(vit(), 2, (96, 96), **SMALL)
    keys, _ = network.encode(noise(1, 3, 96, 96))
    queries = network.side.fusion.enter(network.side.fusion.prompts).unflatten(-1, (3, 16)).transpose(2, 3)
    weights = (queries @ keys.movedim(0, 1).mT / 4).softmax(-1)
    assert (weights * keys.shape[3] - 1).abs().max() < 0.01


def test_what_is_kept_grows_with_the_batch_and_not_with_the_encoder() -> None:
    def kept(batch: int, layers: int) -> int:
        network = fpt(vit(layers=layers), layers=(layers - 2, layers - 1)).train()
        image, label = noise(batch, 3, 96, 96), torch.zeros(batch, dtype=torch.long)
        return saved_activation_bytes(network, lambda: F.cross_entropy(network(image), label))

    assert kept(1, 4) == kept(1, 8)
    slopes = kept(2, 4) - kept(1, 4), kept(3, 4) - kept(2, 4)
    assert slopes[0] == pytest.approx(slopes[1], rel=0.02)


def test_the_file_holds_what_was_learned(tmp_path: Path) -> None:
    network, given = fpt().eval(), noise(1, 3, 96, 96)
    mp.save_adapter(network, tmp_path / "side.safetensors")
    with safe_open(tmp_path / "side.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"side.{name}" for name, _ in network.side.named_parameters()}
    again = FPT(vit(), 3, (96, 96), **SMALL)
    mp.load_adapter(again, tmp_path / "side.safetensors")
    assert torch.equal(again.eval()(given), network(given))


def test_the_side_network_alone_does_not_read_the_backbone() -> None:
    network = mp.adapt(FPT(vit(), 3, (96, 96), **SMALL, variant="side"), [], also_train=["side"]).eval()
    network.backbone.register_forward_hook(lambda *_: pytest.fail("the backbone ran"))
    given = noise(2, 3, 32, 32)
    assert torch.equal(network(given), network(given, noise(2, 2, 3, 7, 16), noise(2, 2, 3, 7, 16)))
    whole = FPT(vit(), 3, (96, 96), **SMALL)
    fusion = sum(p.numel() for p in whole.side.fusion.parameters())
    assert mp.summary(network).trainable == sum(p.numel() for p in whole.side.parameters()) - fusion


def test_volumes() -> None:
    backbone = vit((32, 32, 32), channels=1)
    options = {"side_size": None, "side_patch": (8, 8, 8)}
    network, given = fpt(backbone, (64, 64, 48), **options).eval(), noise(2, 1, 64, 64, 48)
    assert network.side_size == (32, 32, 24)
    assert network.states_shape() == (2, 3, int((4 * 4 * 3 + 1) * 0.2), 16)
    assert network.encode(given)[0].shape == (2, *network.states_shape())
    assert network(given).shape == (2, 3)


def test_stored_features_of_a_volume_give_the_same_scores() -> None:
    network = fpt(vit((32, 32, 32), channels=1), (64, 64, 48), side_size=None, side_patch=(8, 8, 8)).eval()
    given = noise(2, 1, 64, 64, 48)
    small, (keys, values) = F.interpolate(given, (32, 32, 24), mode="area"), network.encode(given)
    wanted = network(given)
    assert torch.equal(network(small, keys, values), wanted)
    half = network(small, keys.half(), values.half())
    assert (half - wanted).abs().max() <= 0.01 * (wanted.max() - wanted.min())
    assert (network(small, keys.flip(0), values.flip(0)) - wanted).abs().max() > 1e-3


def test_a_step_on_volumes_changes_the_side_network_alone() -> None:
    network = fpt(vit((32, 32, 32), channels=1), (64, 64, 48), side_size=None, side_patch=(8, 8, 8)).train()
    before, given, label = state_of(network), noise(2, 1, 64, 64, 48), torch.tensor([0, 2])
    optimiser = torch.optim.AdamW(mp.trainable_parameters(network), lr=1e-3)
    F.cross_entropy(network(given), label).backward()
    assert all(parameter.grad.any() for parameter in network.side.parameters())
    optimiser.step()
    changed = differing(before, state_of(network))
    assert set(changed) == {f"side.{name}" for name, _ in network.side.named_parameters()}


@pytest.mark.parametrize("dims", [2, 3])
def test_it_takes_a_transformer_from_a_pretrained_file(dims: int) -> None:
    """Of an image that is repeated along the depth the inflated transformer sees what the flat one sees of the image."""
    state, depth = timm_vit(layers=4, patch=8), 4 if dims == 3 else 1
    flat, backbone = (
        mp.inflation.vit_from_pretrained(
            state, spatial_dims=n, img_size=32, patch_size=8, in_channels=channels, num_heads=3, class_key_bias=n == 3
        ).eval()
        for n, channels in ((2, 3), (dims, 3 if dims == 2 else 1))
    )
    grey = noise(2, 1, 32, 32)
    image = grey.repeat(1, 3, 1, 1) if dims == 2 else grey[..., None].expand(-1, -1, -1, -1, 32)
    taps = FPT(backbone, 3, (32,) * dims, **SMALL | {"side_size": None}, layers=(1, 2, 3), token_ratio=1.0).taps(image)
    _, hidden = flat(grey.repeat(1, 3, 1, 1))
    for number in (1, 2, 3):
        attention, norm = flat.blocks[number].attn, flat.blocks[number].norm1
        _, *wanted = attention.input_rearrange(attention.qkv(norm(hidden[number - 1])))
        for tokens, found in zip(wanted, (taps.keys[number - 1], taps.values[number - 1]), strict=True):
            copies = torch.cat((tokens[:, :, :1], tokens[:, :, 1:].repeat_interleave(depth, 2)), 2)
            torch.testing.assert_close(found, copies, atol=1e-4, rtol=1e-4)
    network = fpt(backbone, (64,) * dims, side_size=None).train()
    F.cross_entropy(network(noise(2, image.shape[1], *network.img_size)), torch.tensor([0, 2])).backward()
    assert all(parameter.grad is not None for parameter in network.side.parameters())
    assert all(parameter.grad is None for parameter in network.backbone.parameters())


def test_an_inflated_volume_is_scored_with_its_bias() -> None:
    """The bias on the class token of inflated transformers is in the scores too, in chunks or not."""
    from monai_petl.networks.vit.attention_bias import add_attention_bias

    backbone, given = vit((32, 32, 32), channels=1, save_attn=True), noise(1, 1, 32, 32, 32)
    add_attention_bias(backbone, "class_key", (2, 2, 2), 3, depth=2)
    backbone(given)
    taps = read_taps(backbone, given, range(4), (32, 32, 32), 0.5)
    for number, block in enumerate(backbone.blocks):
        torch.testing.assert_close(taps.scores[number], block.attn.att_mat.mean(2), atol=1e-6, rtol=1e-5)


# what is refused


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: FPT(SwinUNETR(1, 2, feature_size=12), 2, (64, 64)),
            TypeError,
            "FPT needs a MONAI ViT .* got SwinUNETR",
        ),
        (lambda: fpt(vit(classification=False)), ValueError, "build the ViT with classification=True"),
        (lambda: fpt(variant="plus"), ValueError, "variant must be one of fpt, fpt_plus, side; got 'plus'"),
        (lambda: fpt(score="max"), ValueError, "score must be one of global, class_token; got 'max'"),
        (lambda: fpt(residual="before"), ValueError, "residual must be one of inside, outside, none"),
        (lambda: fpt(token_ratio=0), ValueError, "token_ratio must be above 0 and at most 1, got 0"),
        (lambda: fpt(layers=[2, 1]), ValueError, r"ascending numbers of blocks, 0 to 3; got \[2, 1\]"),
        (lambda: fpt(layers=[4]), ValueError, r"0 to 3; got \[4\]"),
        (lambda: fpt()(noise(1, 3, 64, 64)), ValueError, r"sees images of \(96, 96\), got \[64, 64\]"),
        (lambda: fpt()(noise(1, 3, 32, 32)), ValueError, "or give stored features besides"),
        (lambda: fpt()(noise(1, 3, 32, 32), noise(1, 2, 3, 7, 16)), ValueError, "come together; only one"),
        (
            lambda: fpt()(noise(1, 3, 64, 64), *[noise(1, 2, 3, 7, 16)] * 2),
            ValueError,
            r"images of \(96, 96\), or of \(32, 32\) beside stored",
        ),
        (
            lambda: mp.adapt(FPT(vit(), 3, (96, 96), **SMALL), mp.methods.LoRA()).train()(noise(1, 3, 96, 96)),
            ValueError,
            "no gradient enters the backbone of FPT",
        ),
        (lambda: trained_size(vit((48, 32)), (64, 64)), ValueError, "6 positions, which are no square or cube"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_saved_bytes_at_512_pixels() -> None:
    """Against 1,162.9 MiB of eager full fine-tuning: at most 57.7 (4.96 %) and 13.4 MiB (1.15 %)."""
    backbone = ViT(3, (384, 384), (16, 16), spatial_dims=2, classification=True, qkv_bias=True)
    label = torch.zeros(1, dtype=torch.long)
    for variant, most in (("fpt", 57.7), ("fpt_plus", 13.4)):
        network = mp.adapt(FPT(backbone, 5, (512, 512), variant=variant), [], also_train=["side"]).train()
        states = [noise(1, *network.states_shape()) for _ in range(2)]
        side = noise(1, 3, *network.side_size)
        kept = saved_activation_bytes(network, lambda n=network, s=states, x=side: F.cross_entropy(n(x, *s), label))
        assert kept / 2**20 <= most
        assert kept > 2 * math.prod(network.states_shape()) * 4


# learning


def checkered(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise in which every other image has a finding: a square of dark and bright pixels in turn, which averages out."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = 0.3 * torch.randn(count, 1, 64, 64, generator=generator), torch.arange(count) % 2
    square = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 - 0.5) * 3
    for ill in images[1::2]:
        y, x = (8 * torch.randint(0, 8, (2,), generator=generator)).tolist()
        ill[0, y : y + 8, x : x + 8] += square
    return images, labels


def area_under_curve(variant: str) -> float:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "mlp_dim": 96, "num_layers": 4, "num_heads": 4}
    backbone = ViT(1, (64, 64), (8, 8), spatial_dims=2, classification=True, qkv_bias=True, **sizes)
    narrow = {"side_size": (16, 16), "side_width": 48, "side_heads": 4, "dropout": 0.1}
    network = mp.adapt(FPT(backbone, 2, (64, 64), variant=variant, **narrow), [], also_train=["side"]).train()
    inputs = []
    for count, seed in ((256, 1), (256, 2)):
        images, labels = checkered(count, seed)
        with torch.no_grad():
            inputs.append((network.at_side_size(images), *network.encode(images), labels))
    *training, labels = inputs[0]
    optimizer = torch.optim.AdamW(mp.trainable_parameters(network), lr=3e-3, weight_decay=0.0)
    for _ in range(100):
        chosen = torch.randperm(256)[:32]
        F.cross_entropy(network(*(t[chosen] for t in training)), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    *test, labels = inputs[1]
    with torch.no_grad():
        probabilities = network.eval()(*test).softmax(1)[:, 1]
    metric = ROCAUCMetric()
    metric(probabilities, labels)
    return float(metric.aggregate())


def test_it_sees_what_the_small_image_does_not_show() -> None:
    """Measured: 0.98 against 0.46, with a transformer that was never trained."""
    alone = area_under_curve("side")
    assert alone < 0.65
    assert area_under_curve("fpt_plus") > alone + 0.25
