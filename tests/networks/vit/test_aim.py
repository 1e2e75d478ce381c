"""AIMViT, AIMSwin and ViTSegmenter on whole volumes, and what the published AIM computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from monai.networks.nets import UNETR, ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

import monai_petl as mp
from monai_petl.core.deltas import deltas_of
from monai_petl.methods import AIM
from monai_petl.networks import AIMSwin, AIMViT, LinearDecoder, ViTSegmenter, slices_of
from monai_petl.networks.vit.slices import as_slices, as_volume
from monai_petl.weights.inflation.files import set_eps
from tests.conftest import differing, state_of, train
from tests.methods.small_networks import shaken
from tests.weights.inflation.published import Case, deviation, image, load_cases, load_expected, tensor

CASES = load_cases("aim")
EXPECTED = load_expected("aim")
DELTAS = {  # the fixture's names
    "temporal_in": "blocks.{}.deltas.temporal_adapter_default.bottleneck_in",
    "temporal": "blocks.{}.deltas.temporal_adapter_default.bottleneck",
    "spatial": "blocks.{}.attn.deltas.spatial_adapter_default.bottleneck",
    "joint": "blocks.{}.mlp.deltas.joint_adapter_default.bottleneck",
}


# the published function


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def our_name(name: str) -> str:
    """The name in an adapted AIMViT of a trained tensor of the fixture."""
    if name == "temporal_embed":
        return "embedded.deltas.slice_default.embedding"
    _, number, part, rest = name.split(".", 3)
    return f"{DELTAS[part].format(number)}.{rest}"


def our_state(case: Case) -> dict[str, Tensor]:
    given = {row["name"].removeprefix(case["prefix"]): tensor(row) for row in case["tensors"]}
    position = given.pop("pos_embed")
    state = {
        "cls_token": given.pop("cls_token") + position[:, :1],
        "patch_embedding.position_embeddings": position[:, 1:],
        "patch_embedding.patch_embeddings.weight": given.pop("patch_embed.weight"),
        "embedded.deltas.slice_default.embedding": given.pop("temporal_embed")[0],
    }
    if "patch_embed.bias" in given:
        state["patch_embedding.patch_embeddings.bias"] = given.pop("patch_embed.bias")
    for number in range(case["config"]["num_layers"]):
        for kind in ("weight", "bias"):
            thirds = [given.pop(f"blocks.{number}.attn.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(thirds)
    for name, value in given.items():
        if name.split(".")[2:3] and name.split(".")[2] in DELTAS:
            state[our_name(name)] = value
        else:
            ours = name.replace("attn.out.", "attn.out_proj.").replace("fc1", "linear1").replace("fc2", "linear2")
            state[ours] = value
    return state


def published(case: Case) -> AIMViT:
    config = case["config"]
    clip = "CLIP" in config["variant"]
    vit = ViT(
        config["in_channels"],
        config["image_size_hw"],
        config["patch_size"],
        config["hidden_size"],
        config["mlp_dim"],
        config["num_layers"],
        config["num_heads"],
        classification=True,
        spatial_dims=2,
        qkv_bias=True,
    )
    del vit.classification_head
    if clip:
        nn.init.zeros_(vit.patch_embedding.patch_embeddings.bias)
        for block in vit.blocks:
            block.mlp.fn = QuickGELU()
    network = AIMViT(vit, nn.LayerNorm(config["hidden_size"]) if clip else None)
    set_eps(network, config["norm_eps"])
    method = AIM(
        config["num_slices"],
        scale=config["joint_scale"],
        drop_path=0.2,  # off in evaluation
        num_temporal_adapters=config["num_temporal_adapters"],
    )
    mp.adapt(network, method)
    missing, unexpected = network.load_state_dict(our_state(case), strict=False)
    assert not unexpected
    allowed = {"patch_embedding.patch_embeddings.bias"} if clip else set()
    assert {n for n in missing if "cross_attn" not in n} == allowed
    return network.eval()


def outputs_of(case: Case, network: AIMViT) -> dict[str, Tensor]:
    entering: list[Tensor] = []
    handle = network.blocks[0].register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    tokens, hidden = network(image(case))
    handle.remove()
    named = {"embedded": entering[0], "final": tokens, "class_tokens": network.class_tokens(image(case))}
    return named | {f"blocks.{number}": states for number, states in enumerate(hidden)}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_outputs_are_the_published_ones(case: Case, record_property) -> None:
    computed = outputs_of(case, published(case))
    recorded = {row["key"].removeprefix(f"{case['name']}/") for row in case["outputs"]}
    assert computed.keys() == recorded
    error = max(deviation(EXPECTED, case, name, value) for name, value in computed.items())
    record_property("error", error)
    assert error < 2e-6


WITH_GRADIENTS = [case for case in CASES if "gradients" in case]


@pytest.mark.parametrize("case", WITH_GRADIENTS, ids=lambda case: case["name"])
def test_gradients_are_the_published_ones(case: Case, record_property) -> None:
    assert len(WITH_GRADIENTS) == 2
    network = published(case)
    (network(image(case))[0] * tensor(case["gradients"]["probe"])).mean().backward()
    errors = []
    for row in case["gradients"]["wrt"]:
        gradient = network.get_parameter(our_name(row["tensor"].removeprefix(case["prefix"]))).grad
        gradient = gradient.reshape(row["shape"])
        error = (gradient - torch.from_numpy(EXPECTED[row["key"]])).abs().max().item() / row["max_abs"]
        assert error < 2e-6, row["tensor"]
        errors.append(error)
    record_property("error", max(errors))


@torch.no_grad()
@pytest.mark.parametrize("case", [c for c in CASES if "CLIP" not in c["config"]["variant"]], ids=lambda c: c["name"])
def test_plain_vit_on_slices_computes_the_published_blocks_too(case: Case) -> None:
    """Here the embedding of slices is added by the first block."""
    inner = published(case)
    vit = ViT(
        3, case["config"]["image_size_hw"], 8, **sizes_of(case), classification=True, spatial_dims=2, qkv_bias=True
    )
    del vit.classification_head
    set_eps(vit, case["config"]["norm_eps"])
    temporal_adapters = case["config"]["num_temporal_adapters"]
    scale = case["config"]["joint_scale"]
    mp.adapt(vit, AIM(case["config"]["num_slices"], scale=scale, num_temporal_adapters=temporal_adapters)).eval()
    state = {name.replace("embedded.", "blocks.0."): value for name, value in inner.state_dict().items()}
    vit.load_state_dict(state)
    _, hidden = vit(as_slices(image(case)))
    for number, states in enumerate(hidden):
        deviation(EXPECTED, case, f"blocks.{number}", states)


def sizes_of(case: Case) -> dict[str, int]:
    return {name: case["config"][name] for name in ("hidden_size", "mlp_dim", "num_layers", "num_heads")}


# AIMViT and AIMSwin


def vit(**options: Any) -> ViT:
    settings = {"hidden_size": 24, "mlp_dim": 48, "num_layers": 3, "num_heads": 3, "classification": True}
    return shaken(ViT(1, (12, 8), (4, 4), spatial_dims=2, qkv_bias=True, **{**settings, **options})).eval()


def swin(**options: Any) -> SwinTransformer:
    """Windows of 3 in maps of 8, 4, 2 and 1: shifted, padded and clipped ones."""
    settings = {"depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "spatial_dims": 2, **options}
    return shaken(SwinTransformer(1, 8, (3, 3), (2, 2), **settings)).eval()


def stirred(network: Any) -> Any:
    """With random deltas, embeddings of slices aside."""
    with torch.no_grad():
        for _, delta in deltas_of(network):
            for name, parameter in delta.named_parameters():
                if "embedding" not in name:
                    parameter.normal_(0, 0.3)
    return network


@torch.no_grad()
@pytest.mark.parametrize("class_token", [True, False])
def test_without_aim_every_slice_is_seen_by_itself(class_token: bool) -> None:
    plain = vit(classification=class_token)
    network, volume = AIMViT(copy.deepcopy(plain)), torch.rand(2, 1, 12, 8, 3)
    result, hidden = network(volume)
    assert result.shape == ((6, 2) if class_token else (6, 6, 24))
    assert len(hidden) == 3
    for row, (b, d) in enumerate((b, d) for b in range(2) for d in range(3)):
        wanted, states = plain(volume[b : b + 1, ..., d])
        torch.testing.assert_close(result[row], wanted[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(hidden[1][row], states[1][0], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_swin_without_aim_gives_the_maps_of_every_slice() -> None:
    plain = swin()
    network, volume = AIMSwin(copy.deepcopy(plain)), torch.rand(2, 1, 16, 16, 3)
    for normalize in (True, False):
        maps = network(volume, normalize)
        assert [tuple(m.shape) for m in maps] == [(2, 8 * 2**i, 8 // 2**i or 1, 8 // 2**i or 1, 3) for i in range(5)]
        for d in range(3):
            for ours, theirs in zip(maps, plain(volume[..., d], normalize), strict=True):
                torch.testing.assert_close(ours[..., d], theirs, atol=1e-5, rtol=1e-5)


def test_they_are_transformers_of_monai_whose_names_load_unchanged() -> None:
    for plain, network in ((vit(), AIMViT(vit())), (swin(), AIMSwin(swin()))):
        assert isinstance(network, type(plain))
        assert differing(state_of(plain), state_of(network))
        network.load_state_dict(plain.state_dict())
        assert not differing(state_of(plain), state_of(network))
        assert list(network.state_dict()) == list(plain.state_dict())
        assert {p.data_ptr() for p in network.parameters()}.isdisjoint({p.data_ptr() for p in plain.parameters()})
        assert not network.training


def test_norm_before_the_blocks_sees_the_embedding_of_slices() -> None:
    norm = shaken(nn.LayerNorm(24))
    network = mp.adapt(AIMViT(vit(), norm), AIM(num_slices=3)).eval()
    entering: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    volume = torch.rand(2, 1, 12, 8, 3)
    before = network(volume)[1][0]
    table = network.get_parameter("embedded.deltas.slice_default.embedding")
    nn.init.normal_(table)
    assert not torch.allclose(network(volume)[1][0], before)
    added = (entering[1] - entering[0]).unflatten(0, (2, 3))  # (B, D, N, C)
    torch.testing.assert_close(added, table[None, :, None].expand_as(added), atol=1e-5, rtol=1e-5)
    assert {"norm_pre.weight", "norm_pre.bias"} <= network.state_dict().keys()
    assert not norm.weight.requires_grad


@torch.no_grad()
def test_class_tokens_are_those_of_every_slice() -> None:
    network, volume = AIMViT(vit()), torch.rand(2, 1, 12, 8, 3)
    tokens, _ = network.tokens(volume)
    found = network.class_tokens(volume)
    assert found.shape == (2, 24, 3)
    torch.testing.assert_close(found[1, :, 2], tokens[5, 0])
    with pytest.raises(ValueError, match="has no class token"):
        AIMViT(vit(classification=False)).class_tokens(volume)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_volumes_tell_aim_their_depth_and_batches_of_slices_do_not(kind: str) -> None:
    network: Any = AIMViT(vit()) if kind == "vit" else AIMSwin(swin())
    size = (12, 8) if kind == "vit" else (16, 16)
    stirred(mp.adapt(network, AIM(num_slices=3))).eval()
    volume = torch.rand(2, 1, *size, 3)

    def last(x: Tensor) -> Tensor:
        return network(x)[1][-1] if kind == "vit" else network(x)[1]

    by_volume = last(volume) if kind == "vit" else as_slices(last(volume))
    torch.testing.assert_close(last(as_slices(volume)), by_volume)
    assert slices_of(network).count is None
    for count in (1, 2, 5, 6):  # as one volume, and two
        both = torch.rand(2, 1, *size, count)
        together = last(both)
        alone = [last(both[b : b + 1]) for b in range(2)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="4 slices is no whole number of volumes of 3 slices"):
        last(torch.rand(4, 1, *size))


def test_count_is_forgotten_after_a_forward_that_failed() -> None:
    network = AIMViT(vit())
    with pytest.raises(RuntimeError):
        network(torch.rand(1, 1, 20, 20, 4))
    assert slices_of(network).count is None


def test_what_they_cannot_take_is_named() -> None:
    with pytest.raises(TypeError, match="AIMViT needs a MONAI ViT, got UNETR"):
        AIMViT(UNETR(1, 2, (16, 16), feature_size=4, hidden_size=12, mlp_dim=12, num_heads=1, spatial_dims=2))
    with pytest.raises(TypeError, match="AIMSwin needs a MONAI SwinTransformer, got ViT"):
        AIMSwin(vit())
    with pytest.raises(
        ValueError, match=r"AIMViT needs a ViT with spatial_dims=2, got one with patches of \(4, 4, 4\)"
    ):
        AIMViT(ViT(1, (8, 8, 8), (4, 4, 4), 12, 12, 1, 1))
    with pytest.raises(ValueError, match="AIMSwin needs a SwinTransformer with spatial_dims=2"):
        AIMSwin(SwinTransformer(1, 8, (3, 3, 3), (2, 2, 2), (2, 2, 2, 2), (1, 1, 1, 1)))
    with pytest.raises(ValueError, match=r"must be volumes \(B, C, H, W, D\) or slices"):
        AIMViT(vit())(torch.rand(1, 12, 8))


def test_slices_and_volumes_are_the_inverse_of_each_other() -> None:
    b, d, h = torch.meshgrid(torch.arange(2), torch.arange(3), torch.arange(4), indexing="ij")
    volume = (100 * b + 10 * d + h).permute(0, 2, 1)[:, None, :, None, :].float()  # (B, 1, H, 1, D)
    slices = as_slices(volume)
    assert [int(code) for code in slices[:, 0, 0, 0]] == [0, 10, 20, 100, 110, 120]
    assert torch.equal(as_volume(slices, 3), volume)


# segmentation


def segmenter(decoder: str = "native", class_token: bool = True, **options: Any) -> ViTSegmenter:
    backbone = vit(classification=class_token)
    return ViTSegmenter(backbone, 3, (12, 8), feature_size=4, decoder=decoder, **options)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 4, 5])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("decoder", ["native", "volume", "linear"])
def test_scores_have_the_size_of_the_volume(decoder: str, class_token: bool, depth: int) -> None:
    network = stirred(mp.adapt(segmenter(decoder, class_token), AIM(num_slices=4), also_train=["decoder"]))
    assert network(torch.rand(2, 1, 12, 8, depth)).shape == (2, 3, 12, 8, depth)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [False, True])
def test_slices_of_a_volume_see_each_other_with_aim_alone(wrap: bool) -> None:
    network = segmenter("linear").eval()
    if wrap:
        network.backbone = AIMViT(network.backbone)
    volume = torch.rand(2, 1, 12, 8, 5)
    other = volume.clone()
    other[0, ..., 1] += 1

    def changed() -> Tensor:
        return (network(other) - network(volume)).abs().amax((1, 2, 3)) > 1e-6  # (B, D)

    only = torch.zeros(2, 5, dtype=torch.bool)
    only[0, 1] = True
    assert torch.equal(changed(), only)
    stirred(mp.adapt(network, AIM(num_slices=4))).eval()
    assert torch.equal(changed(), torch.tensor([[True] * 5, [False] * 5]))
    with mp.disabled(network):
        assert torch.equal(changed(), only)


@torch.no_grad()
def test_decoder_of_volumes_sees_depth_and_enlarges_in_the_plane_only() -> None:
    network = segmenter("volume").eval()
    strides = {tuple(m.stride) for m in network.decoder.modules() if isinstance(m, nn.ConvTranspose3d)}
    assert strides == {(2, 2, 1)}
    volume = torch.rand(1, 1, 12, 8, 5)
    features = [as_volume(f, 5) for f in network.features(as_slices(volume))]
    before = network.decoder(volume, features)
    features[-1] = features[-1].clone()
    features[-1][..., 0] += torch.randn(24, 3, 2)
    assert (network.decoder(volume, features) - before).abs().amax((0, 1, 2, 3))[1] > 1e-4
    assert network(volume)[..., 2].shape == (1, 3, 12, 8)


@torch.no_grad()
def test_maps_for_the_decoder_of_volumes_keep_their_place() -> None:
    network = segmenter("volume").eval()
    seen: list[Any] = []
    network.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    volume = torch.rand(2, 1, 12, 8, 3)
    network(volume)
    image_seen, maps = seen[0]
    assert torch.equal(image_seen, volume)
    tokens, _ = AIMViT(network.backbone).tokens(volume)
    for b, h, w, d in ((0, 0, 1, 2), (1, 2, 0, 1)):
        torch.testing.assert_close(maps[-1][b, :, h, w, d], tokens[b * 3 + d, 1 + h * 2 + w])


@torch.no_grad()
def test_linear_decoder_reads_the_last_block_unless_told_otherwise() -> None:
    assert segmenter("linear").taps == (2,)
    network = segmenter("linear", taps=(0, 2)).eval()
    assert isinstance(network.decoder, LinearDecoder)
    volume = torch.rand(1, 1, 12, 8, 2)
    first, last = network.features(as_slices(volume))
    on_grid = network.decoder.out(torch.cat((first, last), 1))
    wanted = nn.functional.interpolate(on_grid, (12, 8), mode="bilinear")
    torch.testing.assert_close(network(volume), as_volume(wanted, 2))
    assert sum(p.numel() for p in network.decoder.parameters()) == 2 * 24 * 3 + 3


def test_linear_decoder_of_a_3d_backbone_has_the_size_of_the_image() -> None:
    backbone = ViT(1, (8, 8, 8), (4, 4, 4), 12, 24, 2, 2)
    assert ViTSegmenter(backbone, 2, (8, 8, 8), decoder="linear")(torch.rand(1, 1, 8, 8, 8)).shape == (1, 2, 8, 8, 8)


def test_all_of_a_segmenter_with_aim_that_trains_gets_a_gradient_and_the_rest_stays() -> None:
    network = mp.adapt(segmenter("volume"), AIM(num_slices=4, drop_path=0.1), also_train=["decoder"])
    before = state_of(network)
    volume, probe = torch.rand(2, 1, 12, 8, 4), torch.randn(2, 3, 12, 8, 4)
    train(network, lambda: (network(volume) * probe).mean(), steps=4)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert not {n for n, p in network.named_parameters() if p.requires_grad and p.grad is None}
    assert differing(before, state_of(network)) == trained


def test_decoder_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="decoder must be one of native, volume, linear; got 'unet'"):
        segmenter("unet")
    backbone = ViT(1, (8, 8, 8), (4, 4, 4), 12, 24, 2, 2)
    with pytest.raises(
        ValueError, match=r"'volume' is for slices of a 2D backbone; this one has patches of \(4, 4, 4\)"
    ):
        ViTSegmenter(backbone, 2, (8, 8, 8), decoder="volume")
    with pytest.raises(ValueError, match=r"needs volumes \(B, C, H, W, D\), got \(1, 1, 12, 8\)"):
        segmenter("volume")(torch.rand(1, 1, 12, 8))
