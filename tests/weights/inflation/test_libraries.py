"""Random models of timm, torchvision and transformers themselves, where these are installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_petl.inflation import resnet_from_pretrained, swin_from_pretrained, vit_from_pretrained
from tests.weights.inflation.test_guarantees import resnet_stages, swin_stages

TOLERANCE = 1e-4


def randomised(model: nn.Module) -> Any:
    """Every parameter away from its initial value, which is often zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def largest_gap(found: list[Tensor], expected: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ViT", {"image_size": 32, "intermediate_size": 96}),
        ("Dinov2", {"image_size": 40}),
        ("Beit", {"image_size": 32, "intermediate_size": 96, "use_relative_position_bias": True}),
        ("Beit", {"image_size": 32, "intermediate_size": 96, "use_shared_relative_position_bias": True}),
    ],
)
@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "folder"])
@torch.no_grad()
def test_transformers_models_in_memory_and_in_their_folder(
    name: str, settings: dict, saved: bool, tmp_path: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, patch_size=8, **settings
    )
    options = {} if name == "Dinov2" else {"add_pooling_layer": False}
    model = randomised(getattr(transformers, f"{name}Model")(config, **options))
    source: Any = model.state_dict()
    facts: dict[str, Any] = {"num_heads": 4}
    if saved:
        model.save_pretrained(tmp_path)
        source, facts = tmp_path, {}
    image = torch.randn(2, 3, config.image_size, config.image_size)
    network = vit_from_pretrained(source, spatial_dims=2, img_size=config.image_size, **facts).eval()
    states = list(model(image, output_hidden_states=True).hidden_states[1:])
    assert largest_gap(network(image)[1], states) < TOLERANCE


@torch.no_grad()
def test_transformers_swin() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=96, embed_dim=12, depths=[2, 2, 2, 2], num_heads=[2, 2, 4, 4], window_size=3
    )
    model = randomised(transformers.SwinModel(config, add_pooling_layer=False))
    image = torch.randn(2, 3, 96, 96)
    network = swin_from_pretrained(model.state_dict(), spatial_dims=2, img_size=96).eval()
    expected = model(image, output_hidden_states=True).reshaped_hidden_states
    assert largest_gap(swin_stages(network, image)[:4], list(expected[:4])) < TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_values": 0.1, "global_pool": "avg"},
        {"no_embed_class": True},
        {"class_token": False, "global_pool": "avg", "qkv_bias": False},
    ],
)
@torch.no_grad()
def test_timm_vision_transformers(settings: dict) -> None:
    timm = pytest.importorskip("timm")
    model = randomised(
        timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=5, **settings
        )
    )
    network = vit_from_pretrained(model.state_dict(), spatial_dims=2, img_size=32, num_heads=4).eval()
    image = torch.randn(2, 3, 32, 32)
    expected = [model.pos_drop(model._pos_embed(model.patch_embed(image)))]
    for block in model.blocks:
        expected.append(block(expected[-1]))
    assert largest_gap(network(image)[1], expected[1:]) < TOLERANCE


@torch.no_grad()
def test_timm_beit() -> None:
    timm = pytest.importorskip("timm")
    model = randomised(
        timm.models.Beit(
            img_size=32,
            patch_size=8,
            embed_dim=48,
            depth=3,
            num_heads=4,
            num_classes=5,
            init_values=0.1,
            use_abs_pos_emb=False,
            use_rel_pos_bias=True,
        )
    )
    network = vit_from_pretrained(model.state_dict(), spatial_dims=2, img_size=32).eval()
    image = torch.randn(2, 3, 32, 32)
    expected = model.forward_intermediates(image, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC")
    found = network(image)[1]
    states = [torch.cat([prefix, patches], 1) for patches, prefix in expected]
    assert largest_gap(found, states) < TOLERANCE


@torch.no_grad()
def test_timm_swin() -> None:
    timm = pytest.importorskip("timm")
    model = randomised(
        timm.models.SwinTransformer(
            img_size=96, embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), window_size=3, num_classes=5
        )
    )
    network = swin_from_pretrained(model.state_dict(), spatial_dims=2, img_size=96).eval()
    x = image = torch.randn(2, 3, 96, 96)
    x = model.patch_embed(x)
    expected = []
    for layer in model.layers:
        expected.append(layer.downsample(x))
        x = layer(x)
    expected.append(x)
    found = [s.permute(0, 2, 3, 1) for s in swin_stages(network, image)]
    assert largest_gap(found, expected) < TOLERANCE


@torch.no_grad()
def test_torchvision_models() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = randomised(torchvision.models.VisionTransformer(32, 8, 3, 4, 48, 96, num_classes=5))
    network = vit_from_pretrained(model.state_dict(), spatial_dims=2, img_size=32, num_heads=4).eval()
    image = torch.randn(2, 3, 32, 32)
    classes = model.class_token.expand(2, -1, -1)
    expected = model.encoder(torch.cat([classes, model._process_input(image)], 1))
    assert largest_gap([network.norm(network(image)[1][-1])], [expected]) < TOLERANCE
    for name in ("resnet18", "resnet50"):
        model = getattr(torchvision.models, name)().eval()
        network = resnet_from_pretrained(model.state_dict(), spatial_dims=2).eval()
        x = model.maxpool(model.relu(model.bn1(model.conv1(image))))
        stages = [x := layer(x) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
        assert largest_gap(resnet_stages(network, image)[1:], stages) == 0
