"""The body of PUNet: sizes, shapes, and what it shares between passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_petl.networks import PUNET_CONFIGURATIONS, PUNet
from monai_petl.networks.punet.attention import AttentionPrompt
from tests.conftest import small_punet

PARTS = {
    "stem": (9_728, {"conv": 288 + 9_216 + 32, "norm": 192}),
    "enc0": (24_576, {"conv": 9_248, "norm": 64, "shortcut": 1_056, "shortcut_norm": 64, "attention": 14_144}),
    "enc1": (65_984, {"conv": 18_496, "norm": 64, "shortcut": 2_112, "shortcut_norm": 64, "attention": 45_248}),
    "enc2": (251_328, {"conv": 73_856, "norm": 128, "shortcut": 8_320, "shortcut_norm": 128, "attention": 168_896}),
    "enc3": (990_656, {"conv": 295_168, "norm": 256, "shortcut": 33_024, "shortcut_norm": 256, "attention": 661_952}),
    "enc4": (
        2_467_520,
        {"conv": 885_120, "norm": 512, "shortcut": 98_688, "shortcut_norm": 512, "attention": 1_482_688},
    ),
    "dec0": (2_138_048, {"conv": 1_474_816, "norm": 1_280, "attention": 661_952}),
    "dec1": (612_160, {"conv": 442_496, "norm": 768, "attention": 168_896}),
    "dec2": (156_288, {"conv": 110_656, "norm": 384, "attention": 45_248}),
    "dec3": (42_016, {"conv": 27_680, "norm": 192, "attention": 14_144}),
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def default_body() -> nn.Module:
    return PUNet().body


@pytest.mark.parametrize(
    ("configuration", "values"),
    [("2d", 6_758_304), ("3d_flat", 6_792_288), ("3d_anisotropic", 6_882_144), ("3d_large", 6_886_752)],
)
def test_the_body_has_the_published_number_of_parameters(configuration, values):
    network = PUNet(**PUNET_CONFIGURATIONS[configuration])
    assert count(network.body) == values
    assert count(PUNet(**PUNET_CONFIGURATIONS[configuration], arithmetic="published").body) == values


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_the_published_number_of_parameters(default_body, part):
    module = default_body.stem if part == "stem" else default_body.level(part)
    total, composition = PARTS[part]
    assert count(module) == total
    if part == "stem":
        sizes = {
            "conv": sum(count(m) for m in module.modules() if isinstance(m, nn.Conv3d)),
            "norm": sum(count(m) for m in module.modules() if isinstance(m, nn.BatchNorm3d)),
        }
    else:
        sizes = {name: count(child) for name, child in module.named_children()}
    assert sizes == composition


@pytest.mark.parametrize(("block", "width"), [("enc0", 32), ("enc4", 384), ("dec1", 128)])
def test_attention_of_a_level_follows_the_formula(default_body, block, width):
    attention = default_body.level(block).attention
    relative = sum(p.numel() for n, p in attention.named_parameters() if "relative" in n)
    assert relative == 2 * ((15 + 15 + 1) * 32 + 3 * 8 * 32) == 3_520
    assert count(attention) - relative == 2 * (5 * width**2 + 6 * width)


def test_encoder_decoder_biases_and_norm_scales_add_up(default_body):
    assert count(default_body.encoder) == 3_800_064
    assert count(default_body.decoder) == 2_948_512
    assert sum(p.numel() for n, p in default_body.named_parameters() if n.endswith(".bias")) == 15_392
    assert sum(p.numel() for n, p in default_body.named_parameters() if "norm" in n and n.endswith(".weight")) == 7_808


@pytest.mark.parametrize(
    ("depth", "kernels", "strides"),
    [
        (1, [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        (4, [3, 1, 1, 1, 1], [1, 2, 1, 1, 1]),
        (8, [3, 3, 1, 1, 1], [1, 2, 2, 1, 1]),
    ],
)
def test_depth_kernels_and_strides_follow_the_design_depth(depth, kernels, strides):
    body = small_punet(design_depth=depth).body
    encoder, decoder = list(body.encoder.values()), list(body.decoder.values())
    assert [block.conv.kernel_size[2] for block in encoder] == kernels
    assert [block.conv.stride[2] for block in encoder] == strides
    assert [block.conv.kernel_size[2] for block in decoder] == kernels[:0:-1]
    assert [block.scale[2] for block in decoder] == strides[:0:-1]
    assert body.stem.conv1.kernel_size[2] == (3 if depth >= 3 else 1)
    assert body.stem.conv1.stride == (2, 2, 1)


@torch.no_grad()
def test_skips_of_the_flat_configuration_have_the_published_shapes():
    body = small_punet(**PUNET_CONFIGURATIONS["3d_flat"]).body.eval()
    shapes = []
    for block in body.encoder.values():
        block.attention.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[2:])))
    body(torch.randn(1, 1, 80, 80, 4))
    assert shapes == [(40, 40, 4), (20, 20, 2), (10, 10, 2), (5, 5, 2), (3, 3, 2)]


@torch.no_grad()
def test_no_prompts_equal_prompts_of_zero_tokens():
    body = small_punet().body.eval()
    image = torch.randn(2, 1, 32, 32, 1)
    nothing = {}
    for block, width in body.blocks.items():
        empty = torch.zeros(2, 4, 0, width // 4)
        nothing[block] = (AttentionPrompt(empty, empty, torch.zeros(2, 4, 0)),) * 2
    torch.testing.assert_close(body(image, nothing), body(image), atol=1e-6, rtol=1e-6)
    assert torch.equal(body(image, {}), body(image, None))


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_several_passes_equal_repeated_images(training):
    network = small_punet("a", "b", "c").train(training)
    image = torch.randn(2, 1, 32, 32, 1)
    projected = network.body.project(network.prompts.stack(["a", "b", "c"]))
    rows = torch.arange(3).repeat(2)
    prompts = {name: tuple(p.select(rows) for p in pair) for name, pair in projected.items()}
    state = {n: t.clone() for n, t in network.state_dict().items()}
    together = network.body(image, prompts, passes=3)
    network.load_state_dict(state)
    torch.testing.assert_close(together, network.body(image.repeat_interleave(3, 0), prompts), atol=1e-5, rtol=1e-5)


def test_levels_are_known_by_name():
    body = small_punet().body
    assert list(body.blocks) == ["enc0", "enc1", "enc2", "enc3", "enc4", "dec0", "dec1", "dec2", "dec3"]
    assert body.level("enc3") is body.encoder["enc3"]
    assert body.level("dec3") is body.decoder["dec3"]


def test_published_arithmetic_has_the_tensors_of_the_corrected_one():
    corrected, published = small_punet("a").state_dict(), small_punet("a", arithmetic="published").state_dict()
    assert {n: t.shape for n, t in corrected.items()} == {n: t.shape for n, t in published.items()}
