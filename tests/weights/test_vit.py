"""Weights of a ViTSegmenter: the inflated backbone starts as the 2D network, whatever does not fit is refused by name."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm

import monai_petl as mp
from monai_petl.core.records import adapters_of
from monai_petl.inflation import InexactInflationWarning, vit_from_pretrained
from monai_petl.methods import METHODS, adapt_by_name
from monai_petl.networks import ViTSegmenter, load_backbone, load_trained, vit_backbone
from tests.bundles.helpers import checkpoint_state
from tests.conftest import state_of, train
from tests.weights.inflation.published import image as image_of
from tests.weights.inflation.sources import timm_vit
from tests.weights.inflation.test_inflation_parity import BY_NAME
from tests.weights.inflation.test_inflation_parity import build as build_published
from tests.weights.inflation.test_inflation_parity import checkpoint as checkpoint_of

SIZES: dict[str, Any] = {"hidden_size": 24, "mlp_dim": 96, "num_layers": 4, "num_heads": 4}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A 2D vision transformer with random weights, as a file of timm."""
    save_file(checkpoint_state(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def network(img_size: Sequence[int] = (32, 32, 5), patch: Sequence[int] = (8, 8, 5), **options: Any) -> ViTSegmenter:
    backbone = vit_backbone(1, img_size, patch, **{**SIZES, **options})
    return ViTSegmenter(backbone, 3, img_size, feature_size=4, center_slice=img_size[-1] == patch[-1])


def planar_taps(checkpoint: Path, image: Tensor) -> list[Tensor]:
    """Maps (B, hidden size, h, w) of the 2D network on grey images (B, 1, H, W), which it sees as equal colours."""
    vit = vit_from_pretrained(checkpoint, spatial_dims=2, img_size=(32, 32), num_heads=4).eval()
    _, hidden = vit(image.repeat(1, 3, 1, 1))
    taps = [*(layer_norm(tokens, (24,), eps=1e-6) for tokens in hidden[:-1]), vit.norm(hidden[-1])]
    return [tokens[:, 1:].mT.unflatten(2, (4, 4)) for tokens in taps]


@torch.no_grad()
@pytest.mark.parametrize("inflation", ["center", "average"])
def test_taps_of_a_window_without_change_along_depth_are_those_of_the_2d_network(
    inflation: str, checkpoint: Path
) -> None:
    image = torch.rand(2, 1, 32, 32)
    inflated = load_backbone(network(), checkpoint, inflation).eval()
    features = inflated.features(image[..., None].expand(-1, -1, -1, -1, 5))
    for found, expected in zip(features, planar_taps(checkpoint, image), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_center_inflation_sees_the_center_slice_alone_at_the_start(checkpoint: Path) -> None:
    window = torch.rand(1, 1, 32, 32, 5)
    inflated = load_backbone(network(), checkpoint).eval()
    expected = planar_taps(checkpoint, window[..., 2])
    for found, planar in zip(inflated.features(window), expected, strict=True):
        torch.testing.assert_close(found, planar, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_several_patches_along_depth_start_as_the_2d_network_with_a_bias_on_the_class_token(checkpoint: Path) -> None:
    image = torch.rand(1, 1, 32, 32)
    inflated = load_backbone(network((32, 32, 6), (8, 8, 2), attention_bias="class_key"), checkpoint).eval()
    features = inflated.features(image[..., None].expand(-1, -1, -1, -1, 6))
    for found, expected in zip(features, planar_taps(checkpoint, image), strict=True):
        for depth in range(3):
            torch.testing.assert_close(found[..., depth], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [None, "class_key", "table"])
def test_epsilon_and_biases_are_there_before_any_weights(bias: str | None) -> None:
    vit = vit_backbone(1, (32, 32, 4), (8, 8, 2), norm_eps=1e-12, attention_bias=bias, **SIZES)
    assert {m.eps for m in vit.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    hooked = [block.attn.rel_positional_embedding is not None for block in vit.blocks]
    assert set(hooked) == {bias is not None}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"hidden_size": 48, "mlp_dim": 64},
            r"it has hidden_size 24, mlp_dim 96, the network hidden_size 48, mlp_dim 64",
        ),
        ({"num_layers": 2}, "it has num_layers 4, the network num_layers 2"),
        ({"norm_eps": 1e-5}, "it has norm_eps 1e-06, the network norm_eps 1e-05"),
        ({"class_token": False}, "it has class_token True, the network class_token False"),
        ({"attention_bias": "table"}, "it has attention_bias None, the network attention_bias table"),
    ],
)
def test_settings_other_than_those_of_the_file_are_named(options: dict[str, Any], said: str, checkpoint: Path) -> None:
    fresh = network(**options)
    before = state_of(fresh)
    with pytest.raises(ValueError, match=said):
        load_backbone(fresh, checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_another_number_of_heads_is_named(tmp_path: Path) -> None:
    """From the usual width of a head, or from a config.json beside the file."""
    save_file(timm_vit(hidden=128, patch=8), tmp_path / "model.safetensors")

    sizes = {"hidden_size": 128, "mlp_dim": 512, "num_layers": 2}
    with pytest.raises(ValueError, match="it has num_heads 2, the network num_heads 4"):
        load_backbone(network(**sizes, num_heads=4), tmp_path / "model.safetensors")
    load_backbone(network(**sizes, num_heads=2), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}', encoding="utf-8")
    load_backbone(network(**sizes, num_heads=4), tmp_path / "model.safetensors")


def test_class_key_of_a_single_depth_is_no_bias(checkpoint: Path) -> None:
    plain = network(attention_bias="class_key")
    assert plain.backbone.blocks[0].attn.rel_positional_embedding is None
    load_backbone(plain, checkpoint)


def test_checkpoint_of_another_kind_is_named(tmp_path: Path) -> None:
    state = {"conv1.weight": torch.zeros(8, 3, 7, 7)}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="names of no known family"):
        load_backbone(network(), tmp_path / "other.safetensors")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "aim"])  # which is for 2D
def test_methods_train_what_they_say(method: str, checkpoint: Path) -> None:
    adapted = load_backbone(adapt_by_name(network(), method, ["decoder"]), None if method == "scratch" else checkpoint)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    names = {n for n, _ in adapted.named_parameters() if "norm_cross_attn" not in n}
    assert {n for n in names if n.startswith("decoder.")} <= trained
    if method in ("full", "scratch"):
        assert trained == names
    if method == "head":
        assert all(n.startswith("decoder.") for n in trained)
    adapted(torch.rand(1, 1, 32, 32, 5)).sum().backward()
    assert {n for n, p in adapted.named_parameters() if p.grad is not None} == trained
    kernel = adapted.backbone.patch_embedding.patch_embeddings.weight
    assert torch.equal(kernel[:, 0, ..., 2], checkpoint_state()["patch_embed.proj.weight"].sum(1)) == (
        method != "scratch"
    )


def test_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match=r"method must be one of lora, vpetl, .*; got 'prompt'"):
        adapt_by_name(network(), "prompt")
    with pytest.raises(ValueError, match=r"method_options .* do not fit the method lora: .*'ranks'"):
        adapt_by_name(network(), "lora", options={"ranks": 3})


@pytest.mark.parametrize("method", [name for name in METHODS if name != "aim"])  # which is for 2D
@pytest.mark.parametrize("loaded_first", [True, False], ids=["before", "after"])
def test_network_comes_back_from_its_file_and_from_its_adapter(
    loaded_first: bool, method: str, checkpoint: Path, tmp_path: Path
) -> None:
    source = None if method == "scratch" else checkpoint
    adapted = network()
    for step in (0, 1):
        if (step == 0) == loaded_first:
            load_backbone(adapted, source)
        else:
            adapt_by_name(adapted, method, ["decoder"])
    image = torch.rand(2, 1, 32, 32, 5)
    train(adapted, lambda: adapted(image).square().mean())
    torch.save(adapted.eval().state_dict(), tmp_path / "model.pt")
    adapter = mp.save_adapter(adapted, tmp_path / "adapter.safetensors")
    for options in ({}, {"adapter_path": adapter}):
        fresh = load_backbone(adapt_by_name(network(), method, ["decoder"]), source if options else None)
        again = load_trained(fresh, tmp_path / "model.pt", **options).eval()
        state = again.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.state_dict().items())


def test_an_adapter_of_another_method_takes_its_place_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = network()
    saved = {
        method: mp.save_adapter(adapt_by_name(copy.deepcopy(backbone), method, ["decoder"]), tmp_path / f"{method}.st")
        for method in ("lora", "norm")
    }
    for prepared, file in itertools.product(saved, saved):
        caplog.clear()
        fresh = load_trained(adapt_by_name(copy.deepcopy(backbone), prepared, ["decoder"]), None, saved[file])
        assert list(adapters_of(fresh)) == [file]
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        if prepared == file:
            assert not said
        else:
            named = {"lora": "LoRA", "norm": "NormOnly"}
            assert f"trained with {named[file]}, which takes the place of {named[prepared]}" in said[0]


def test_file_of_another_network_is_named(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="tensors are missing, left over or of another shape"):
        load_trained(network(num_layers=2), tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"no pre-trained network at .*none\.pt"):
        load_trained(network(), tmp_path / "none.pt")


@torch.no_grad()
def test_beit_fits_with_a_table_of_relative_positions(tmp_path: Path) -> None:
    case = BY_NAME["average_c1_s5"]
    published = build_published(case)  # whose features equal those of the published code
    save_file({n: t.contiguous() for n, t in checkpoint_of(case).items()}, tmp_path / "beit.safetensors")
    embedding, block = published.patch_embedding, published.blocks[0]
    size = tuple(image_of(case).shape[2:])
    backbone = vit_backbone(
        1,
        size,
        tuple(embedding.patch_embeddings.kernel_size),
        hidden_size=published.norm.normalized_shape[0],
        mlp_dim=block.mlp.linear1.out_features,
        num_layers=len(published.blocks),
        num_heads=block.attn.num_heads,
        norm_eps=1e-12,
        attention_bias="table",
    )
    inflated = load_backbone(
        ViTSegmenter(backbone, 2, size, center_slice=True), tmp_path / "beit.safetensors", "average"
    )
    for found, expected in zip(inflated.eval().backbone(image_of(case))[1], published(image_of(case))[1], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_beit_with_several_patches_along_depth_starts_as_its_2d_self(tmp_path: Path) -> None:
    case = BY_NAME["average_c1_s5"]
    state = {n: t.contiguous() for n, t in checkpoint_of(case).items()}
    save_file(state, tmp_path / "beit.safetensors")
    size = tuple(image_of(case).shape[2:4])
    facts = {"spatial_dims": 2, "img_size": size, "in_channels": 1}
    planar = vit_from_pretrained(tmp_path / "beit.safetensors", **facts).eval()
    patch = tuple(planar.patch_embedding.patch_embeddings.kernel_size)
    sizes = {
        "hidden_size": planar.norm.normalized_shape[0],
        "mlp_dim": planar.blocks[0].mlp.linear1.out_features,
        "num_layers": len(planar.blocks),
        "num_heads": planar.blocks[0].attn.num_heads,
    }
    deep = network((*size, 6), (*patch, 2), **sizes, norm_eps=1e-12, attention_bias="table")
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactInflationWarning)
        load_backbone(deep, tmp_path / "beit.safetensors").eval()
    image = torch.rand(1, 1, *size)
    tokens = deep.backbone(image.unsqueeze(-1).expand(-1, -1, -1, -1, 6))[1][-1][:, 1:]
    expected = planar(image)[1][-1][:, 1:]
    for depth in range(3):
        torch.testing.assert_close(tokens[:, depth::3], expected, atol=1e-4, rtol=1e-4)
