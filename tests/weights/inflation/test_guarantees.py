"""On a volume that does not change along depth, the inflated network computes what the 2D network computes on a slice."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from einops import rearrange
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from monai_petl import adapt, trainable_parameters
from monai_petl.inflation import (
    ClassKeyBias,
    InexactInflationWarning,
    RelativePositionBias,
    inflate_state_dict,
    resnet_from_pretrained,
    swin_from_pretrained,
    vit_from_pretrained,
)
from tests.weights.inflation.sources import resnet, timm_swin, timm_vit
from tests.weights.inflation.test_convert_parity import BY_NAME, checkpoint

MODES = ("center", "average")


def deep(image: Tensor, depth: int, axis: int = 2) -> Tensor:
    """A grey volume that repeats the image."""
    return image.unsqueeze(2 + axis).repeat_interleave(depth, dim=2 + axis)


def planes(tokens: Tensor, depth: int, axis: int = 2, extra: int = 0) -> Tensor:
    """Tokens (B, extra + h*w*d, C) by depth token: (d, B, h*w, C)."""
    order = "(hw d)" if axis == 2 else "(d hw)"
    return rearrange(tokens[:, extra:], f"b {order} c -> d b hw c", d=depth)


def gap(deep_states: list[Tensor], flat_states: list[Tensor], depth: int, axis: int = 2, extra: int = 0) -> float:
    """The largest deviation of any depth token in any hidden state, class tokens included."""
    gaps = []
    for found, expected in zip(deep_states, flat_states, strict=True):
        gaps.append((planes(found, depth, axis, extra) - expected[:, extra:]).abs().max())
        gaps += [(found[:, :extra] - expected[:, :extra]).abs().max()] if extra else []
    return max(gaps).item()


@torch.no_grad()
def vit_states(state: dict[str, Tensor], depth: int = 1, tokens: int = 1, axis: int = 2, **options: Any) -> list[Any]:
    """Hidden states of the 3D and the 2D network on a grey image, the 2D one in three colours, and the 3D network."""
    image, size, patch = torch.randn(2, 1, 12, 20), [12, 20], [4, 4]
    facts = {"num_heads": 4, **({"grid": options.pop("grid")} if "grid" in options else {})}
    size.insert(axis, depth * tokens)
    patch.insert(axis, depth)
    flat = vit_from_pretrained(state, spatial_dims=2, img_size=(12, 20), **facts).eval()
    network = vit_from_pretrained(
        state, spatial_dims=3, img_size=size, patch_size=patch, in_channels=1, depth_axis=axis, **facts, **options
    ).eval()
    return [network(deep(image, depth * tokens, axis))[1], flat(image.repeat(1, 3, 1, 1))[1], network]


@pytest.mark.parametrize(("mode", "depth", "tokens"), itertools.product(MODES, (1, 3), (1, 2, 3, 4)))
def test_a_vit_without_class_token_is_exact_for_any_number_of_depth_tokens(mode: str, depth: int, tokens: int) -> None:
    volume, flat, _ = vit_states(timm_vit(class_token=False), depth, tokens, mode=mode)
    assert gap(volume, flat, tokens) <= (1e-5 if mode == "center" else 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_vit_with_depth_first_is_exact(mode: str) -> None:
    volume, flat, _ = vit_states(timm_vit(class_token=False), 2, 3, axis=0, mode=mode)
    assert gap(volume, flat, 3, axis=0) <= 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_a_vit_with_class_token_is_exact_for_one_depth_token(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactInflationWarning)
        volume, flat, _ = vit_states(timm_vit(), 5, 1, mode=mode)
    assert gap(volume, flat, 1, extra=1) <= 1e-5


@pytest.mark.parametrize(("mode", "channels"), itertools.product(MODES, (1, 4)))
@torch.no_grad()
def test_equal_channels_give_what_the_grey_image_gives_in_three_colours(mode: Any, channels: int) -> None:
    state, image = timm_vit(), torch.randn(1, 1, 16, 16)
    flat = vit_from_pretrained(state, spatial_dims=2, img_size=16, num_heads=4).eval()
    network = vit_from_pretrained(
        state, spatial_dims=3, img_size=(16, 16, 5), in_channels=channels, num_heads=4, mode=mode
    ).eval()
    volume = deep(image.repeat(1, channels, 1, 1), 5)
    assert gap(network(volume)[1], flat(image.repeat(1, 3, 1, 1))[1], 1, extra=1) <= 1e-5


@pytest.mark.parametrize(("mode", "tokens"), itertools.product(MODES, (2, 3, 4)))
def test_several_depth_tokens_beside_a_class_token_are_exact_with_the_key_bias_only(mode: str, tokens: int) -> None:
    state = timm_vit()
    state["cls_token"] *= 5
    volume, flat, network = vit_states(state, 2, tokens, class_key_bias=True, mode=mode)
    assert gap(volume, flat, tokens, extra=1) <= 1e-5
    assert isinstance(network.blocks[0].attn.rel_positional_embedding, ClassKeyBias)
    with pytest.warns(InexactInflationWarning, match=f"{tokens} depth tokens share one class token.*class_key_bias"):
        volume, flat, _ = vit_states(state, 2, tokens, mode=mode)
    assert gap(volume, flat, tokens, extra=1) > 1e-2


def test_position_table_alone_learns_to_tell_depths_apart_on_a_frozen_backbone() -> None:
    """Copies along depth start equal; where the volume changes along depth they get gradients of their own."""
    network = vit_from_pretrained(
        timm_vit(class_token=False), spatial_dims=3, img_size=(16, 16, 4), patch_size=(4, 4, 2), num_heads=4
    )
    adapt(network, [], ["patch_embedding.position_embeddings"])
    (table,) = trainable_parameters(network)
    copies = table.view(1, 16, 2, 24)
    assert torch.equal(copies[:, :, 0], copies[:, :, 1])
    network(torch.randn(1, 3, 16, 16, 4))[1][-1].square().sum().backward()
    assert table.grad is not None
    gradient = table.grad.view(1, 16, 2, 24)
    assert (gradient[:, :, 0] - gradient[:, :, 1]).abs().max() > 1e-2


def test_relative_positions_hold_for_several_depth_tokens_with_the_key_bias() -> None:
    """The bias goes into the rows that the table has for the class token."""
    state = checkpoint(BY_NAME["hf_beit"])
    image, options = torch.randn(1, 1, 32, 32), {"num_heads": 4}
    flat = vit_from_pretrained(state, spatial_dims=2, img_size=32, **options).eval()
    network = vit_from_pretrained(
        state, spatial_dims=3, img_size=(32, 32, 6), patch_size=(8, 8, 2), in_channels=1, class_key_bias=True, **options
    ).eval()
    assert isinstance(network.blocks[0].attn.rel_positional_embedding, RelativePositionBias)
    with torch.no_grad():
        assert gap(network(deep(image, 6))[1], flat(image.repeat(1, 3, 1, 1))[1], 3, extra=1) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_patch_embedding_of_every_depth_token_is_that_of_the_slice(mode: Any) -> None:
    state, image = timm_vit(class_token=False), torch.randn(1, 1, 16, 16)
    flat = vit_from_pretrained(state, spatial_dims=2, img_size=16, num_heads=4)
    network = vit_from_pretrained(
        state, spatial_dims=3, img_size=(16, 16, 12), patch_size=(4, 4, 4), in_channels=1, num_heads=4, mode=mode
    )
    found, expected = network.patch_embedding(deep(image, 12)), flat.patch_embedding(image.repeat(1, 3, 1, 1))
    torch.testing.assert_close(planes(found, 3), expected.expand(3, -1, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 4])
@torch.no_grad()
def test_linear_patch_embeddings_compute_what_convolutions_compute(channels: int) -> None:
    state, volume = timm_vit(), torch.randn(1, channels, 16, 16, 6)
    conv, linear = (
        vit_from_pretrained(
            state,
            spatial_dims=3,
            img_size=(16, 16, 6),
            in_channels=channels,
            num_heads=4,
            mode="average",
            network_options={"proj_type": kind},
        ).eval()
        for kind in ("conv", "perceptron")
    )
    torch.testing.assert_close(conv(volume)[1], linear(volume)[1], atol=1e-5, rtol=1e-5)


def swin_stages(network: Any, x: Tensor) -> list[Tensor]:
    """Patch embedding and the stages, the fourth without its merging, which is new."""
    last = network.layers4[0]
    merging, last.downsample = last.downsample, None
    states = network(x, normalize=False)
    last.downsample = merging
    return states


@pytest.mark.parametrize(("mode", "downsample", "axis"), itertools.product(MODES, ("merging", "mergingv2"), (0, 2)))
@torch.no_grad()
def test_a_swin_is_exact_at_every_stage_for_both_ways_of_merging(mode: Any, downsample: str, axis: int) -> None:
    state, image, depth = timm_swin(), torch.randn(1, 1, 96, 96), 32 if axis == 2 else 16
    size, patch = [96, 96], [4, 4]
    size.insert(axis, depth)
    patch.insert(axis, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactInflationWarning)
        flat = swin_from_pretrained(state, spatial_dims=2, img_size=(96, 96)).eval()
        network = swin_from_pretrained(
            state,
            spatial_dims=3,
            img_size=size,
            patch_size=patch,
            in_channels=1,
            mode=mode,
            downsample=downsample,
            depth_axis=axis,
            window_depth=None if axis == 2 else 4,  # along the first axis MONAI clips windows as it should
        ).eval()
    volumes, images = swin_stages(network, deep(image, depth, axis)), swin_stages(flat, image.repeat(1, 3, 1, 1))
    for found, expected in zip(volumes, images, strict=True):
        torch.testing.assert_close(found, expected.unsqueeze(2 + axis).expand_as(found), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "options", "sentence"),
    [
        ((96, 96, 16), {"window_depth": 4}, "stage 1 .*clips to the wrong biases: use a window of at most 2"),
        (
            (96, 96, 32),
            {"window_depth": 3},
            "stage 0 has 8 tokens along axis 2 and a window of 3, which pads with zeros",
        ),
        ((96, 96, 24), {"window_depth": 1}, "stage 1 merges 3 depth tokens in pairs"),
        ((96, 96, 30), {"window_depth": 1}, "is padded to patches"),
        ((64, 96, 32), {"window_depth": 1}, "along axis 0 and a window of 3, which pads with zeros"),
    ],
)
def test_a_swin_that_does_not_start_exactly_warns(size: tuple[int, ...], options: dict, sentence: str) -> None:
    with pytest.warns(InexactInflationWarning, match=sentence):
        swin_from_pretrained(timm_swin(), spatial_dims=3, img_size=size, in_channels=1, **options)


def test_a_swin_of_transformers_warns_of_windows_that_it_does_not_shift() -> None:
    with pytest.warns(InexactInflationWarning, match="3x6 tokens: transformers shifts no window there"):
        swin_from_pretrained(checkpoint(BY_NAME["hf_swin"]), spatial_dims=2, img_size=(96, 192))


def test_windows_along_depth_are_as_deep_as_is_exact() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactInflationWarning)
        network = swin_from_pretrained(
            timm_swin(), spatial_dims=3, img_size=(96, 96, 64), in_channels=1, network_options={"drop_rate": 0.1}
        )
    assert tuple(network.window_size) == (3, 3, 2)


def resnet_stages(network: Any, x: Tensor) -> list[Tensor]:
    states = [network.act(network.bn1(network.conv1(x))).clone()]
    x = network.maxpool(states[0])
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = layer(x)
        states.append(x.clone())
    return states


@torch.no_grad()
def test_a_resnet_is_exact_in_every_plane_by_center_and_in_inner_planes_only_by_average() -> None:
    state, image = resnet(), torch.randn(1, 1, 40, 32)
    flat = resnet_stages(resnet_from_pretrained(state, spatial_dims=2).eval(), image.repeat(1, 3, 1, 1))
    center = resnet_from_pretrained(state, spatial_dims=3, in_channels=1).eval()
    for found, expected in zip(resnet_stages(center, deep(image, 32)), flat, strict=True):
        torch.testing.assert_close(found, expected.unsqueeze(-1).expand_as(found), atol=1e-4, rtol=1e-4)
    image = torch.randn(1, 1, 16, 16)
    flat = resnet_stages(resnet_from_pretrained(state, spatial_dims=2).eval(), image.repeat(1, 3, 1, 1))
    with pytest.warns(InexactInflationWarning, match="reads the zero padding along depth.*use mode center"):
        average = resnet_from_pretrained(state, spatial_dims=3, in_channels=1, mode="average").eval()
    stages = resnet_stages(average, deep(image, 256))  # deep enough for inner planes in the last stage, of 8 planes
    for found, expected in zip(stages, flat, strict=True):
        error = (found - expected.unsqueeze(-1)).abs().amax((0, 1, 2, 3))
        assert error[0] > 1e-2
        assert error[-1] > 1e-2
        assert error[3:-3].max() < 1e-4


def test_a_padded_kernel_of_even_depth_warns() -> None:
    with pytest.warns(InexactInflationWarning, match="a padded kernel of even depth looks beyond the last plane"):
        resnet_from_pretrained(resnet(), spatial_dims=3, network_options={"conv1_t_size": (7, 7, 4)})


@pytest.mark.parametrize("mode", MODES)
def test_all_depth_planes_of_a_kernel_receive_gradient(mode: Any) -> None:
    network = vit_from_pretrained(
        timm_vit(), spatial_dims=3, img_size=(16, 16, 5), in_channels=1, num_heads=4, mode=mode
    )
    network(torch.randn(2, 1, 16, 16, 5))[1][-1].square().sum().backward()
    gradient = network.patch_embedding.patch_embeddings.weight.grad
    assert all(gradient[..., z].abs().max() > 0 for z in range(5))


@torch.no_grad()
def test_a_2d_network_of_any_class_inflates_to_its_3d_self() -> None:
    """Transposed convolutions and running statistics included."""
    settings: dict[str, Any] = {"out_channels": 2, "features": (4, 4, 8, 8, 8, 4), "norm": "batch"}
    flat = BasicUNet(spatial_dims=2, in_channels=3, **settings).eval()
    network = BasicUNet(spatial_dims=3, in_channels=1, **settings).eval()
    inflated = inflate_state_dict(flat.state_dict(), network)
    network.load_state_dict(inflated.state)
    image = torch.randn(1, 1, 32, 32)
    found = network(deep(image, 32))
    expected = flat(image.repeat(1, 3, 1, 1)).unsqueeze(-1)
    torch.testing.assert_close(found, expected.expand_as(found), atol=1e-4, rtol=1e-4)
    assert inflated.report.inflated["upcat_1.upsample.deconv.weight"] == "transposed kernel 2 deep"


def test_a_network_without_a_2d_counterpart_says_which_tensors_differ() -> None:
    flat, network = nn.Conv2d(3, 4, 3), nn.Conv3d(3, 5, 3)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 3, 3, 3\) in the source and \(5, 3, 3, 3, 3\)"):
        inflate_state_dict(flat.state_dict(), network)
    with pytest.raises(ValueError, match=r"1 tensors of the source are not in the network \(bias\)"):
        inflate_state_dict(flat.state_dict(), nn.Conv3d(3, 4, 3, bias=False))
    with pytest.raises(ValueError, match="stride 1 along depth has no exact 2D counterpart"):
        inflate_state_dict(nn.ConvTranspose2d(2, 2, 3).state_dict(), nn.ConvTranspose3d(2, 2, 3))
