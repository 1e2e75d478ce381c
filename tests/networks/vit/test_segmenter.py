"""ViTSegmenter: any MONAI ViT as the backbone, images of its size in, scores of the same size out."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from monai.networks.nets import UNet, ViT
from torch import Tensor, nn

import monai_petl as mp
from monai_petl.core.summary import saved_activation_bytes
from monai_petl.networks import ViTSegmenter
from tests.conftest import differing, state_of, train

CASES = {
    "2D": ((32, 32), (16, 16), (2, 1, 32, 32)),
    "2D, sides differ": ((32, 16), (8, 8), (2, 1, 32, 16)),
    "2D, patch 14": ((28, 42), (14, 14), (2, 1, 28, 42)),
    "2D, patch 2": ((8, 8), (2, 2), (2, 1, 8, 8)),
    "2D, patch 1": ((4, 4), (1, 1), (2, 1, 4, 4)),
    "2D, patch 32": ((64, 64), (32, 32), (2, 1, 64, 64)),
    "volume by slices": ((32, 32), (16, 16), (2, 1, 32, 32, 3)),
    "3D": ((16, 16, 16), (8, 8, 8), (2, 1, 16, 16, 16)),
    "3D, flat patch": ((32, 32, 8), (16, 16, 4), (2, 1, 32, 32, 8)),
    "3D, patch 14 and depth 5": ((28, 14, 10), (14, 14, 5), (2, 1, 28, 14, 10)),
}


def backbone(img_size: Sequence[int], patch: Sequence[int], **options: Any) -> ViT:
    defaults = {"hidden_size": 24, "mlp_dim": 40, "num_layers": 4, "num_heads": 4, "classification": True}
    sizes = {"img_size": img_size, "patch_size": patch, "spatial_dims": len(img_size)}
    return ViT(**{"in_channels": 1, **sizes, **defaults, "qkv_bias": True, **options})


def segmenter(img_size: Sequence[int], patch: Sequence[int], **options: Any) -> ViTSegmenter:
    own = {key: options.pop(key) for key in ("taps", "center_slice") if key in options}
    return ViTSegmenter(backbone(img_size, patch, **options), 3, img_size, feature_size=4, **own)


def centered(**options: Any) -> ViTSegmenter:
    return segmenter((32, 32, 5), (16, 16, 5), center_slice=True, **options)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_scores_have_the_size_of_the_image(case: str, class_token: bool) -> None:
    img_size, patch, shape = CASES[case]
    network = segmenter(img_size, patch, classification=class_token)
    assert network(torch.rand(shape)).shape == (shape[0], 3, *shape[2:])


@pytest.mark.parametrize("batch", [1, 3])
def test_center_slice_of_a_window_is_predicted(batch: int) -> None:
    assert centered()(torch.rand(batch, 1, 32, 32, 5)).shape == (batch, 3, 32, 32, 1)


def test_patches_may_be_embedded_by_a_perceptron() -> None:
    network = segmenter((32, 32, 8), (16, 16, 4), proj_type="perceptron", in_channels=2)
    assert network(torch.rand(1, 2, 32, 32, 8)).shape == (1, 3, 32, 32, 8)


@torch.no_grad()
def test_a_volume_by_slices_is_each_slice_by_itself() -> None:
    network = segmenter((32, 32), (16, 16)).eval()
    volume = torch.rand(2, 1, 32, 32, 3)
    alone = torch.stack([network(volume[..., k]) for k in range(3)], -1)
    torch.testing.assert_close(network(volume), alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_image_of_a_batch_does_not_notice_the_others() -> None:
    network = centered().eval()
    images = torch.rand(3, 1, 32, 32, 5)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]), atol=1e-5, rtol=1e-5)


def test_head_of_a_classifier_is_taken_away() -> None:
    assert not [name for name in centered().state_dict() if "head" in name]


# taps


def test_taps_spread_evenly_by_default() -> None:
    assert segmenter((16, 16), (8, 8), num_layers=12).taps == (2, 5, 8, 11)
    assert segmenter((16, 16), (8, 8), num_layers=2).taps == (0, 1)


@torch.no_grad()
@pytest.mark.parametrize("class_token", [True, False])
def test_taps_are_the_normed_maps_of_the_blocks(class_token: bool) -> None:
    network = segmenter((16, 24), (8, 8), taps=(1, 3), classification=class_token).eval()
    nn.init.normal_(network.backbone.norm.bias)
    image = torch.rand(2, 1, 16, 24)
    _, hidden = network.backbone(image)
    first, last = network.features(image)
    mean, variance = hidden[1].mean(-1, keepdim=True), hidden[1].var(-1, keepdim=True, correction=0)
    standardised = (hidden[1] - mean) / (variance + network.backbone.norm.eps).sqrt()
    skipped = int(class_token)
    for row, column in ((0, 0), (1, 2), (0, 2)):
        token = skipped + 3 * row + column
        torch.testing.assert_close(first[:, :, row, column], standardised[:, token])
        torch.testing.assert_close(last[:, :, row, column], network.backbone.norm(hidden[3])[:, token])


@torch.no_grad()
@pytest.mark.parametrize("case", ["2D", "2D, patch 14", "2D, patch 2", "2D, patch 1", "3D, flat patch"])
def test_every_tap_and_the_image_reach_the_scores(case: str) -> None:
    img_size, patch, _ = CASES[case]
    network = segmenter(img_size, patch).eval()
    image = torch.rand(1, 1, *img_size)
    features = network.features(image)
    before = network.decoder(image, features)
    for changed in range(4):
        other = [f + (k == changed) * torch.randn_like(f) for k, f in enumerate(features)]
        assert not torch.allclose(network.decoder(image, other), before)
    assert not torch.allclose(network.decoder(torch.rand_like(image), features), before)


# training


def test_every_parameter_that_the_scores_need_gets_a_gradient() -> None:
    network = centered()
    network(torch.rand(1, 1, 32, 32, 5)).square().sum().backward()
    without = {n for n, p in network.named_parameters() if p.grad is None}
    assert all("norm_cross_attn" in name for name in without)


def test_frozen_backbone_is_bit_identical_after_training_and_the_decoder_is_all_that_trains() -> None:
    network = mp.adapt(centered(dropout_rate=0.1), [], also_train=["decoder"])
    assert {n.split(".")[0] for n, p in network.named_parameters() if p.requires_grad} == {"decoder"}
    before = state_of(network)
    image = torch.rand(2, 1, 32, 32, 5)
    train(network, lambda: network(image).square().mean(), weight_decay=0.1)
    changed = differing(before, state_of(network))
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    assert list(mp.adapter_state_dict(network)) == [n for n in before if n.startswith("decoder.")]


def test_nothing_inside_a_frozen_backbone_is_kept_for_the_backward_pass() -> None:
    image = torch.rand(2, 1, 32, 32, 5)
    kept = {}
    for blocks, frozen in ((4, True), (12, True), (4, False), (12, False)):
        network = centered(num_layers=blocks)
        if frozen:
            mp.adapt(network, [], also_train=["decoder"])
        kept[blocks, frozen] = saved_activation_bytes(network, lambda network=network: network(image))
    assert kept[4, True] == kept[12, True] < kept[4, False] < kept[12, False]


def test_tensors_kept_with_a_frozen_backbone_have_the_shape_of_maps() -> None:
    network = mp.adapt(centered(), [], also_train=["decoder"])
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.rand(2, 1, 32, 32, 5))
    assert shapes
    assert not [shape for shape in shapes if len(shape) == 3]  # tokens (B, N, hidden size)
    assert not [shape for shape in shapes if len(shape) == 4 and shape[1:3] == (4, 5)]  # attention (B, heads, N, N)


def test_adapter_of_the_decoder_is_refused_by_another_backbone(tmp_path) -> None:
    fresh = centered().eval()
    network = mp.adapt(copy.deepcopy(fresh), [], also_train=["decoder"])
    image = torch.rand(1, 1, 32, 32, 5)
    train(network, lambda: network(image).square().mean())
    path = mp.save_adapter(network.eval(), tmp_path / "decoder.safetensors")
    again = mp.load_adapter(fresh, path)
    torch.testing.assert_close(again(image), network(image), atol=1e-6, rtol=1e-6)
    with pytest.raises(mp.AdapterFileError, match="another backbone"):
        mp.load_adapter(centered(), path)


# export


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["center slice", "3D"])
def test_traced_and_exported_networks_equal_the_network_for_any_batch(name: str) -> None:
    network = (centered() if name == "center slice" else segmenter((32, 32, 8), (16, 16, 4))).eval()
    example = torch.rand(2, 1, *network.img_size)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, example), buffer)
    buffer.seek(0)
    traced = torch.jit.load(buffer)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},)).module()
    for count in (1, 3):
        image = torch.rand(count, 1, *network.img_size)
        torch.testing.assert_close(traced(image), network(image), atol=1e-5, rtol=0)
        torch.testing.assert_close(program(image), network(image), atol=1e-5, rtol=0)


# what does not fit


def test_wrong_backbone_is_named() -> None:
    network = UNet(2, 1, 2, (4, 8), (2,))
    with pytest.raises(TypeError, match="needs a MONAI ViT as its backbone, got UNet, which has no patch_embedding"):
        ViTSegmenter(network, 2, (16, 16))


@pytest.mark.parametrize("taps", [(0, 4), (-1, 2), (2, 1), (1, 1), ()])
def test_tap_that_is_not_there_is_named(taps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="taps must be increasing numbers of blocks from 0 to 3"):
        segmenter((16, 16), (8, 8), taps=taps)


def test_sizes_that_do_not_fit_the_backbone_are_named() -> None:
    vit = backbone((32, 32), (16, 16))
    with pytest.raises(ValueError, match=r"multiples of the backbone's patches of \(16, 16\) voxels, got \(32, 40\)"):
        ViTSegmenter(vit, 2, (32, 40))
    with pytest.raises(ValueError, match=r"built for 4 patches, but images of .* have 8"):
        ViTSegmenter(vit, 2, (32, 64))
    with pytest.raises(ValueError, match="img_size must have 2 numbers"):
        ViTSegmenter(vit, 2, (32, 32, 5))
    with pytest.raises(ValueError, match="as deep as the window of slices"):
        segmenter((32, 32, 8), (16, 16, 4), center_slice=True)
    with pytest.raises(ValueError, match="as deep as the window of slices"):
        ViTSegmenter(vit, 2, (32, 32), center_slice=True)


def test_image_of_another_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"built for images of \(32, 32, 5\) voxels, got \(32, 32, 7\); crop or pad"):
        centered()(torch.rand(1, 1, 32, 32, 7))
