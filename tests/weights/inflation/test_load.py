"""Checkpoints into networks: what the report says, what is refused, and files of inflated networks."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.blocks import TransformerBlock
from monai.networks.nets import UNETR, ResNet, SwinUNETR, ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from monai_petl.inflation import (
    InexactInflationWarning,
    build_from_pretrained,
    convert_state_dict,
    inflate_state_dict,
    load_inflated,
    load_pretrained,
    read_checkpoint,
    resnet_from_pretrained,
    save_inflated,
    swin_from_pretrained,
    vit_from_pretrained,
)
from tests.weights.inflation.sources import resnet, timm_swin, timm_vit
from tests.weights.inflation.test_convert_parity import BY_NAME, checkpoint

DINOV2 = Path(__file__).parents[3] / "../shared/weights/dinov2_vits14/model.safetensors"
VIT = {"num_heads": 4, "spatial_dims": 3, "img_size": (16, 16, 5), "in_channels": 1}


def eps_of(network: nn.Module) -> set[float]:
    return {m.eps for m in network.modules() if isinstance(m, nn.LayerNorm)}


def test_the_loader_sets_epsilon_everywhere_and_a_wrong_one_shows_in_the_report() -> None:
    assert eps_of(vit_from_pretrained(timm_vit(), **VIT)) == {1e-6}
    assert eps_of(
        vit_from_pretrained(checkpoint(BY_NAME["hf_vit"]), grid=(6, 4), **{**VIT, "img_size": (16, 16, 5)})
    ) == {1e-12}
    assert eps_of(vit_from_pretrained(timm_vit(), eps=1e-5, **VIT)) == {1e-5}
    report = convert_state_dict(timm_vit(), eps=1e-5).report
    assert "layer norm epsilon 1e-05 as given; timm_vit checkpoints usually have 1e-06" in str(report)
    network = ViT(1, (16, 16, 5), (4, 4, 5), 24, 96, 2, 4, classification=True, qkv_bias=True)
    report = load_pretrained(network, timm_vit(), img_size=(16, 16, 5))
    assert "epsilon of 7 normalisation layers set to 1e-06" in report.notes


@torch.no_grad()
def test_folded_layer_scale_computes_what_an_explicit_one_computes() -> None:
    state = timm_vit(layers=1)
    plain = vit_from_pretrained(state, num_heads=4, spatial_dims=2, img_size=16).blocks[0].eval()
    scales = [torch.rand(24) + 0.5 for _ in range(2)]
    scaled = {**state, "blocks.0.ls1.gamma": scales[0], "blocks.0.ls2.gamma": scales[1]}
    folded = vit_from_pretrained(scaled, num_heads=4, spatial_dims=2, img_size=16).blocks[0].eval()
    assert isinstance(folded, TransformerBlock)
    x = torch.randn(2, 17, 24)
    y = x + scales[0] * plain.attn(plain.norm1(x))
    y = y + scales[1] * plain.mlp(plain.norm2(y))
    torch.testing.assert_close(folded(x), y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "swin"])
@torch.no_grad()
def test_folded_normalisation_takes_images_as_they_are(kind: str) -> None:
    def last(network: nn.Module, image: Tensor) -> Tensor:
        states = network.eval()(image)
        return states[1][-1] if kind == "vit" else states[-2]  # a Swin ends with a merging that is random

    build: Any = vit_from_pretrained if kind == "vit" else swin_from_pretrained
    state, size, facts = (timm_vit(), 16, {"num_heads": 4}) if kind == "vit" else (timm_swin(), 96, {})
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    plain = build(state, spatial_dims=2, img_size=size, **facts)
    folded = build(state, spatial_dims=2, img_size=size, in_channels=1, image_mean=mean, image_std=std, **facts)
    image = torch.rand(1, 1, size, size)
    normalised = (image - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(last(folded, image), last(plain, normalised), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (vit_from_pretrained, {"image_std": (1.0, 1.0)}, "a number for each of the source's 3 channels.*1.0, 1.0"),
        (vit_from_pretrained, {"image_std": (1.0, 0.0, 1.0)}, "positive deviations"),
        (resnet_from_pretrained, {"image_mean": (0.5, 0.5, 0.5)}, "not into convolutions that pad"),
    ],
)
def test_a_normalisation_that_cannot_be_folded_is_refused(build: Any, options: Any, message: str) -> None:
    if build is resnet_from_pretrained:
        source, sizes = resnet(), {}
    else:
        source, sizes = timm_vit(), {"img_size": 16, "num_heads": 4}
    with pytest.raises(ValueError, match=message):
        build(source, spatial_dims=2, **sizes, **options)


def test_the_report_lists_what_was_dropped_filled_folded_resized_and_left_fresh(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = checkpoint(BY_NAME["hf_beit_shared_abs"])
    network = ViT(1, (48, 32, 4), (8, 8, 4), 48, 96, 3, 4, classification=True, qkv_bias=True)
    with caplog.at_level(logging.INFO, logger="monai_petl"):
        report = load_pretrained(network, {**state, "pooler.layernorm.weight": torch.ones(48)}, img_size=(48, 32, 4))
    assert set(report.dropped) == {"pooler.layernorm.weight"}
    assert len(report.zero_filled) == 3  # key biases
    assert {"blocks.0.scale1", "position of the class token"} <= set(report.folded)
    assert "patch_embedding.position_embeddings" in report.interpolated
    assert "blocks.2.attn.rel_positional_embedding.relative_position_bias_table" in report.interpolated
    assert {"norm.weight", "classification_head.0.weight", "blocks.0.norm_cross_attn.bias"} <= set(report.fresh)
    assert set(report.renamed) == set(state)
    assert "blocks.0.norm1.weight" in report.copied
    for part in ("positions from (5, 5) to (6, 4), bicubic", "kernel 4 deep, center", "the source has no final norm"):
        assert part in str(report)
        assert part in caplog.text


def test_every_tensor_of_a_network_is_in_the_report_once() -> None:
    network = ViT(1, (16, 16, 5), (4, 4, 5), 24, 96, 2, 4, classification=True, qkv_bias=True)
    report = load_pretrained(network, timm_vit(), img_size=(16, 16, 5))
    listed = [*report.copied, *report.inflated, *report.interpolated, *report.fresh]
    assert sorted(listed) == sorted(network.state_dict())


@pytest.mark.parametrize("missing", ["blocks.0.attn.proj.weight", "blocks.1.norm2.bias", "patch_embed.proj.weight"])
def test_a_missing_tensor_is_named(missing: str) -> None:
    state = timm_vit()
    del state[missing]
    wanted = "patch_embedding.patch_embeddings.weight" if missing.startswith("patch") else r"blocks.\d\.\w+"
    with pytest.raises(ValueError, match=f"lacks 1 tensors that would become {wanted}|names of no known family"):
        convert_state_dict(state)


REFUSED: list[tuple[str, str]] = [
    ("norm_pre.weight", "a layer norm between embedding and first block"),
    ("reg_token", "register tokens"),
    ("blocks.0.attn.q_norm.weight", "normalisation of queries and keys"),
    ("blocks.0.mlp.w12.weight", r"a gated \(SwiGLU\) MLP"),
    ("attn_pool.latent", "pooling by attention"),
    ("dist_token", "a distillation token"),
    ("something.new", "1 of its tensors are not known there: something.new"),
]


@pytest.mark.parametrize(("name", "sentence"), REFUSED)
def test_what_monai_cannot_hold_or_is_not_known_is_refused_by_name(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refusal:
        convert_state_dict({**timm_vit(), name: torch.ones(4)})
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_packed_gated_mlp_is_seen_by_its_shapes() -> None:
    state = timm_vit()
    for i in range(2):
        state[f"blocks.{i}.mlp.fc2.weight"] = torch.randn(24, 48)
    with pytest.raises(ValueError, match="goes from 96 to 48 values, it is a gated"):
        convert_state_dict(state)


def test_positions_that_are_computed_in_the_network_are_refused() -> None:
    state = {n: t for n, t in timm_vit().items() if n != "pos_embed"}
    with pytest.raises(ValueError, match="holds no positions, neither a table nor relative ones"):
        convert_state_dict(state, num_heads=4)


def test_a_wrong_family_says_what_it_is_and_what_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"is a swin .*, a vit is wanted. Use swin_from_pretrained"):
        vit_from_pretrained(timm_swin(), **VIT)
    with pytest.raises(ValueError, match=r"holds a.b \.\.\., names of no known family; expected one of"):
        convert_state_dict({"a.b": torch.ones(1)})
    with pytest.raises(ValueError, match="source must be one of"):
        convert_state_dict(timm_vit(), source="clip")
    with pytest.raises(ValueError, match=r"lacks \d+ tensors|are not known there"):
        convert_state_dict(timm_vit(), source="hf_vit")
    with pytest.raises(TypeError, match="the source is a resnet, for one ResNet of MONAI; ViT has 0"):
        load_pretrained(ViT(1, 16, 4, 24, 96, 2, 4), resnet())
    with pytest.raises(ValueError, match="a wide ResNet or ResNeXt"):
        convert_state_dict({**resnet(), "layer1.0.conv2.weight": torch.randn(4, 2, 3, 3)})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"img_size": (18, 16, 5)}, r"img_size \(18, 16, 5\) is no multiple of patch_size \(4, 4, 5\)"),
        ({"img_size": (16, 16, 5), "patch_size": (4, 4, 2)}, r"no multiple of patch_size \(4, 4, 2\)"),
        ({"img_size": (16, 16)}, "img_size must have 3 values for spatial_dims=3"),
        ({"patch_size": (8, 8, 5)}, r"patches of \(4, 4\) in the source, \(8, 8\) in the network.*resize_patch=True"),
        ({"num_heads": 5}, "num_heads must divide the hidden size 24, got 5"),
        (
            {"num_heads": None},
            "number of heads cannot be told from a hidden size of 24. Give the source's as num_heads=",
        ),
        ({"grid": (3, 5)}, "17 entries, one for the class token: no grid of 3 x 5 patches"),
        ({"mode": "middle"}, "mode must be one of center, average, got 'middle'"),
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
        ({"in_channels": 0}, "in_channels must be a whole number of at least 1, got 0"),
        ({"img_size": (16, 16, 0)}, r"img_size must be whole numbers of voxels such as 224,224,5; got \(16, 16, 0\)"),
        ({"img_size": "16x16x5"}, "img_size must be whole numbers of voxels such as 224,224,5; got '16x16x5'"),
        ({"num_heads": "four"}, "num_heads must be a whole number of at least 1, got 'four'"),
        ({"grid": 4}, r"grid must be two numbers \(h, w\), got 4"),
        ({"eps": -1.0}, "eps must be a positive number, got -1.0"),
        ({"resize_patch": "no"}, "resize_patch must be True or False, got 'no'"),
        (
            {"network_options": {"hidden_size": 3}},
            r"network_options \['hidden_size'\] do not go with the rest: .*multiple values",
        ),
        ({"network_options": {"colour": 1}}, "network_options .* do not go with the rest: .*unexpected keyword"),
        ({"image_mean": 0.5}, "image_mean and image_std need a number for each channel, got 0.5"),
        ({"position_mod": "bicubic"}, "there is no option position_mod; the options of inflation are mode"),
    ],
)
def test_sizes_and_options_that_do_not_fit_are_sentences(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refusal:
        vit_from_pretrained(timm_vit(), **{**VIT, **options})
    assert "\n" not in str(refusal.value)


def test_resizing_the_patch_is_an_option_that_warns() -> None:
    with pytest.warns(InexactInflationWarning, match="patch_embeddings.weight was resized"):
        network = vit_from_pretrained(timm_vit(), **{**VIT, "patch_size": (8, 8, 5)}, resize_patch=True)
    assert network.patch_embedding.patch_embeddings.weight.shape == (24, 1, 8, 8, 5)


def test_a_network_is_as_it_was_after_an_error() -> None:
    network = ViT(1, (32, 32, 4), (8, 8, 4), 48, 96, 4, 4, classification=True, qkv_bias=True)
    before = {n: t.clone() for n, t in network.state_dict().items()}
    with pytest.raises(ValueError, match="of the network are not in the source"):
        load_pretrained(network, checkpoint(BY_NAME["hf_beit"]), img_size=(32, 32, 4))
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in after.items())
    assert eps_of(network) == {1e-5}


def test_networks_with_a_vit_or_swin_inside_are_loaded_in_place() -> None:
    state = timm_vit(layers=12, patch=16)
    unetr = UNETR(1, 2, (32, 32, 16), feature_size=4, hidden_size=24, mlp_dim=96, num_heads=4, qkv_bias=True)
    with pytest.warns(InexactInflationWarning, match="the class token of the source is left out"):
        report = load_pretrained(unetr, state, img_size=(32, 32, 16))
    assert "cls_token" in report.dropped
    assert torch.equal(unetr.vit.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])
    assert unetr(torch.randn(1, 1, 32, 32, 16)).shape == (1, 2, 32, 32, 16)
    swin = SwinUNETR(
        1, 2, feature_size=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), window_size=(3, 3, 2), patch_norm=True
    )
    with pytest.warns(InexactInflationWarning, match="patch_embed.proj.weight was resized"):
        report = load_pretrained(swin, timm_swin(), img_size=(96, 96, 32), resize_patch=True)
    assert "layers4.0.downsample.reduction.weight" in report.fresh
    with pytest.raises(ValueError, match="patches of"):
        load_pretrained(swin, timm_swin())


def test_a_network_built_with_other_options_says_which() -> None:
    def vit(**options: Any) -> ViT:
        return ViT(3, (16, 16), 4, 24, 96, 2, 4, spatial_dims=2, **options)

    with pytest.raises(ValueError, match="Build it with qkv_bias=True"):
        load_pretrained(vit(classification=True), timm_vit())
    with pytest.raises(ValueError, match="Build it with classification=False"):
        load_pretrained(vit(classification=True, qkv_bias=True), timm_vit(class_token=False))
    with pytest.raises(ValueError, match=r"not bridge\. Build the network with the sizes and options of the source"):
        load_pretrained(vit(classification=True, qkv_bias=True), timm_vit(hidden=28))


def test_another_number_of_heads_is_refused_wherever_weights_are_loaded(tmp_path: Path) -> None:
    """Shapes do not tell the heads, and another number computes something else."""

    def vit(heads: int) -> ViT:
        return ViT(1, (16, 16, 5), (4, 4, 5), 24, 96, 2, heads, classification=True, qkv_bias=True)

    with pytest.raises(ValueError, match=r"the source has 4 heads, the network 2. Build it with the source's"):
        load_pretrained(vit(2), timm_vit(), img_size=(16, 16, 5), num_heads=4)
    file = save_inflated(vit_from_pretrained(timm_vit(), **VIT), tmp_path / "vit.safetensors", {})
    with pytest.raises(ValueError, match=r"has \[4, 4\] heads in its blocks, the network \[2, 2\]"):
        load_inflated(vit(2), file)
    load_inflated(vit(4), file)


def test_facts_of_the_source_come_before_its_conversion() -> None:
    network = ViT(1, (16, 16, 5), (4, 4, 5), 24, 96, 2, 4, classification=True, qkv_bias=True)
    with pytest.raises(
        ValueError, match="num_heads is a fact for the conversion, and this source is converted already"
    ):
        load_pretrained(network, convert_state_dict(timm_vit(), num_heads=4), img_size=(16, 16, 5), num_heads=4)


def test_a_table_of_several_possible_grids_is_refused_until_its_own_is_given() -> None:
    vit = {**VIT, "img_size": (24, 16, 5)}
    state = timm_vit(grid=(4, 6), class_token=False)
    with pytest.raises(ValueError, match=r"24 entries, which is no square. Give the source's grid as grid=\(h, w\)"):
        vit_from_pretrained(state, **vit)
    assert "positions from (4, 6) to (6, 4)" in str(
        load_pretrained(
            vit_from_pretrained(state, **vit, grid=(4, 6)),
            convert_state_dict(state, grid=(4, 6), num_heads=4),
            img_size=(24, 16, 5),
        )
    )
    flat = ViT(3, (16, 16), 4, 24, 96, 2, 4, spatial_dims=2)
    target = ViT(3, (8, 32), 4, 24, 96, 2, 4, spatial_dims=2)
    with pytest.raises(ValueError, match="16 entries, which may be of several grids"):
        inflate_state_dict(flat.state_dict(), target, img_size=(8, 32))


def test_an_image_size_other_than_the_networks_is_named() -> None:
    network = ViT(1, (16, 16, 5), (4, 4, 5), 24, 96, 2, 4, classification=True, qkv_bias=True)
    with pytest.raises(
        ValueError, match=r"images of \(32, 16, 5\) voxels have 32 patches .* the network was built for 16"
    ):
        load_pretrained(network, timm_vit(), img_size=(32, 16, 5), num_heads=4)


def test_a_kernel_of_a_video_network_is_refused() -> None:
    state = timm_vit()
    state["patch_embed.proj.weight"] = torch.randn(24, 3, 2, 4, 4)
    with pytest.raises(ValueError, match=r"has shape \(24, 3, 2, 4, 4\), not \(out, in, h, w\): it is no 2D network"):
        convert_state_dict(state, num_heads=4)


def test_biases_of_attention_take_the_type_of_the_network() -> None:
    network = ViT(1, (32, 24, 5), (8, 8, 5), 48, 96, 3, 4, classification=True, qkv_bias=True).to(torch.bfloat16)
    load_pretrained(network, checkpoint(BY_NAME["hf_beit"]), img_size=(32, 24, 5))
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network(torch.randn(1, 1, 32, 24, 5).bfloat16())[1][-1].dtype == torch.bfloat16
    assert not network.patch_embedding.position_embeddings.requires_grad  # the source has none


def test_epsilon_of_batch_norms_is_set_too() -> None:
    network = resnet_from_pretrained(resnet(), spatial_dims=3, eps=1e-3)
    assert {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm3d)} == {1e-3}


def test_flat_windows_of_a_swin_are_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    _, report = build_from_pretrained("swin", timm_swin(), spatial_dims=3, img_size=(96, 96, 32))
    assert "attention stays in its plane" in str(report)
    network, report = build_from_pretrained("swin", timm_swin(), spatial_dims=3, img_size=(96, 96, 64))
    assert tuple(network.window_size) == (3, 3, 2)  # type: ignore[arg-type]
    assert "attention stays in its plane" not in str(report)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vit", {"img_size": 16, "window_depth": 2}, "a vit has no window_depth; got 2"),
        ("vit", {"img_size": 16, "downsample": "mergingv2"}, "a vit has no downsample; got 'mergingv2'"),
        ("resnet", {"patch_size": 4}, "a resnet has no patch_size; got 4"),
        ("swin", {"img_size": (96, 96, 32), "window_depth": 0}, "window_depth is for 3D and at least 1, got 0"),
    ],
)
def test_arguments_that_a_network_has_not_got_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    source = {"vit": timm_vit, "swin": timm_swin, "resnet": resnet}[kind]()
    facts = {"num_heads": 4} if kind == "vit" else {}
    with pytest.raises(ValueError, match=message):
        build_from_pretrained(kind, source, spatial_dims=3, **facts, **options)


def test_weights_without_query_biases_go_into_networks_with_or_without_them() -> None:
    state = {n: t for n, t in timm_vit().items() if not n.endswith("qkv.bias")}
    assert vit_from_pretrained(state, **VIT).blocks[0].attn.qkv.bias is None
    network = vit_from_pretrained(state, **VIT, network_options={"qkv_bias": True})
    assert not network.blocks[1].attn.qkv.bias.any()


def test_position_tables_without_an_entry_for_the_class_token_are_known_from_a_square() -> None:
    state = timm_vit()
    state["pos_embed"] = state["pos_embed"][:, 1:]
    converted = convert_state_dict(state)
    assert torch.equal(converted.state["cls_token"], state["cls_token"])
    assert converted.architecture.grid == (4, 4)  # type: ignore[attr-defined]


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[int, ...]]] = {
    "vit": (
        lambda: vit_from_pretrained(timm_vit(), **VIT),
        lambda: ViT(1, (16, 16, 5), (4, 4, 5), 24, 96, 2, 4, classification=True, qkv_bias=True),
        (1, 1, 16, 16, 5),
    ),
    "vit with key bias": (
        lambda: vit_from_pretrained(timm_vit(), **VIT, patch_size=(4, 4, 1), class_key_bias=True),
        lambda: ViT(1, (16, 16, 5), (4, 4, 1), 24, 96, 2, 4, classification=True, qkv_bias=True),
        (1, 1, 16, 16, 5),
    ),
    "beit": (
        lambda: vit_from_pretrained(checkpoint(BY_NAME["hf_beit"]), **{**VIT, "img_size": (32, 24, 5)}),
        lambda: ViT(1, (32, 24, 5), (8, 8, 5), 48, 96, 3, 4, classification=True, qkv_bias=True),
        (1, 1, 32, 24, 5),
    ),
    "swin": (
        lambda: swin_from_pretrained(timm_swin(), spatial_dims=3, img_size=(96, 96, 32), window_depth=1),
        lambda: SwinTransformer(3, 12, (3, 3, 1), (4, 4, 4), (2, 2, 2, 2), (2, 2, 4, 4), patch_norm=True),
        (1, 3, 96, 96, 32),
    ),
    "resnet": (
        lambda: resnet_from_pretrained(resnet(), spatial_dims=3, in_channels=1),
        lambda: ResNet(
            "basic", [1, 1, 1, 1], [4, 6, 8, 8], 3, 1, conv1_t_stride=2, feed_forward=False, bias_downsample=False
        ),
        (1, 1, 32, 32, 16),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_saved_network_computes_the_same_after_loading_it_into_a_fresh_one(name: str, tmp_path: Path) -> None:
    build, fresh, shape = FAMILIES[name]
    network, volume = build().eval(), torch.randn(shape)
    file = save_inflated(network, tmp_path / "new" / "weights.safetensors", {"mode": "center"})
    loaded = load_inflated(fresh(), file).eval()
    found, expected = loaded(volume), network(volume)
    found, expected = (x if isinstance(x, list | tuple) else [x] for x in (found, expected))
    flat = [[t for x in out for t in (x if isinstance(x, list) else [x])] for out in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
    assert not list(tmp_path.glob("**/.*"))


def test_a_swin_file_for_the_other_way_of_merging_is_refused(tmp_path: Path) -> None:
    build, _, _ = FAMILIES["swin"]
    file = save_inflated(build(), tmp_path / "swin.safetensors", {})
    other = SwinTransformer(
        3, 12, (3, 3, 1), (4, 4, 4), (2, 2, 2, 2), (2, 2, 4, 4), patch_norm=True, downsample="mergingv2"
    )
    with pytest.raises(ValueError, match="made for downsample='merging', the network has 'mergingv2'"):
        load_inflated(other, file)


def test_a_file_of_another_network_or_origin_is_refused(tmp_path: Path) -> None:
    file = save_inflated(FAMILIES["vit"][0](), tmp_path / "vit.safetensors", {"img_size": [16, 16, 5]})
    with pytest.raises(ValueError, match="holds a ViT, the network is a ResNet"):
        load_inflated(FAMILIES["resnet"][1](), file)
    with pytest.raises(ValueError, match=r"does not fit this ViT.*It was made with \{'img_size': \[16, 16, 5\]\}"):
        load_inflated(ViT(1, (16, 16, 8), (4, 4, 4), 24, 96, 2, 4, classification=True, qkv_bias=True), file)
    with pytest.raises(ValueError, match=r"is inflated already\. Load it with"):
        vit_from_pretrained(file, **VIT)
    save_file(timm_vit(), tmp_path / "timm.safetensors")
    with pytest.raises(ValueError, match=r"was not written by save_inflated\. Use load_pretrained"):
        load_inflated(FAMILIES["vit"][1](), tmp_path / "timm.safetensors")
    with pytest.raises(FileNotFoundError, match="no inflated network at"):
        load_inflated(FAMILIES["vit"][1](), tmp_path / "none.safetensors")


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('the file ran code')",))


def test_files_are_read_without_running_code_and_damage_is_a_sentence(tmp_path: Path) -> None:
    torch.save({"state_dict": timm_vit()}, tmp_path / "good.pt")
    assert read_checkpoint(tmp_path / "good.pt").state.keys() == timm_vit().keys()
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "old.bin").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pt", "old.bin"):
        with pytest.raises(ValueError, match="holds objects other than tensors, which are not loaded"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:2000])
    save_file(timm_vit(), tmp_path / "good.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:2000])
    (tmp_path / "empty.pt").touch()
    for name in ("cut.pt", "cut.safetensors", "empty.pt"):
        with pytest.raises(ValueError, match=r"truncated|damaged") as refusal:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(refusal.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors or pytorch_model.bin in"):
        read_checkpoint(tmp_path)


def test_files_of_other_kinds_and_broken_settings_are_sentences(tmp_path: Path) -> None:
    for name, content in {"text.pt": b"hello world", "bytes.pt": bytes(range(100, 256)), "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no file of torch.save|{name} is damaged"):
            read_checkpoint(tmp_path / name)
    torch.save({1: torch.ones(1)}, tmp_path / "numbered.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_checkpoint(tmp_path / "numbered.pt")
    save_file(timm_vit(), tmp_path / "model.safetensors")
    for content, message in (("{", "config.json is no JSON"), ("[1, 2]", "config.json holds no settings by name")):
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6}', encoding="utf-8")
    assert read_checkpoint(tmp_path / "model.safetensors").config == {"num_attention_heads": 6}


def test_a_folder_tells_heads_and_epsilon_by_its_config(tmp_path: Path) -> None:
    save_file(checkpoint(BY_NAME["hf_vit_task_nobias"]), tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text('{"num_attention_heads": 6, "layer_norm_eps": 1e-7, "hidden_act": "gelu"}', encoding="utf-8")
    network = vit_from_pretrained(tmp_path, spatial_dims=2, img_size=32)
    assert network.blocks[0].attn.num_heads == 6
    assert eps_of(network) == {1e-7}
    config.write_text('{"hidden_act": "quick_gelu"}', encoding="utf-8")
    with pytest.raises(ValueError, match="hidden_act 'quick_gelu', MONAI computes gelu"):
        vit_from_pretrained(tmp_path, spatial_dims=2, img_size=32)


def test_a_name_on_the_hub_needs_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        read_checkpoint("nobody/nothing")


def test_a_name_on_the_hub_is_downloaded_by_its_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert name == "somebody/vit"
        assert "config.json" in allow_patterns
        save_file(timm_vit(), tmp_path / "model.safetensors")
        return str(tmp_path)

    client = type("Client", (), {"snapshot_download": staticmethod(snapshot_download)})
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", client)
    assert read_checkpoint("somebody/vit").state.keys() == timm_vit().keys()


@pytest.mark.skipif(not DINOV2.exists(), reason=f"no pre-trained weights at {DINOV2}")
@torch.no_grad()
def test_published_dinov2_weights_convert_and_load() -> None:
    network = vit_from_pretrained(DINOV2, spatial_dims=3, img_size=(28, 42, 3), in_channels=1).eval()
    flat = vit_from_pretrained(DINOV2, spatial_dims=2, img_size=(28, 42)).eval()
    assert network.blocks[0].attn.num_heads == 6
    assert eps_of(network) == {1e-6}
    image = torch.rand(1, 1, 28, 42)
    found, expected = network(image.unsqueeze(-1).repeat(1, 1, 1, 1, 3))[1], flat(image.repeat(1, 3, 1, 1))[1]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    weight = load_file(DINOV2)["encoder.layer.0.mlp.fc1.weight"]
    assert torch.equal(flat.blocks[0].mlp.linear1.weight, weight.float())
