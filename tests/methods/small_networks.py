"""Small networks of MONAI for the tests of methods, and what those tests ask of every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.networks.nets import UNETR, DenseNet, DynUNet, FlexibleUNet, ResNet, SegResNet, SwinUNETR, UNet, ViT
from torch import Tensor, nn

from monai_petl.networks import ViTSegmenter
from tests.conftest import shake_statistics, train


def vit(spatial_dims: int = 2, **options: Any) -> ViT:
    """A classifier of two blocks with 17 tokens in 2D, 65 in 3D."""
    settings = {
        "hidden_size": 24,
        "mlp_dim": 48,
        "num_layers": 2,
        "num_heads": 3,
        "classification": True,
        "num_classes": 3,
    }
    size = (16,) * spatial_dims
    return ViT(1, size, (4,) * spatial_dims, spatial_dims=spatial_dims, **{**settings, **options})


def unetr(spatial_dims: int = 2, **options: Any) -> UNETR:
    settings = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 3}
    return UNETR(1, 2, (32,) * spatial_dims, spatial_dims=spatial_dims, **{**settings, **options})


def swin_unetr(spatial_dims: int = 2, **options: Any) -> SwinUNETR:
    """Eight blocks; images of 64 voxels give shifted windows with a mask, and windows that are padded."""
    settings = {"feature_size": 12, "num_heads": (1, 2, 2, 4), "window_size": 5}
    return SwinUNETR(1, 2, spatial_dims=spatial_dims, **{**settings, **options})


def unet(channels: Sequence[int] = (4, 8, 8), **options: Any) -> UNet:
    strides = (2,) * (len(channels) - 1)
    return UNet(2, 1, 3, channels, strides, **{"num_res_units": 1, "norm": "batch", **options})


def segresnet() -> SegResNet:
    return SegResNet(2, 8, 1, 3, blocks_down=(1, 1), blocks_up=(1,))


def flexible_unet() -> FlexibleUNet:
    return FlexibleUNet(1, 3, "resnet10", decoder_channels=(16, 12, 8, 8, 4), spatial_dims=2)


def dynunet(deep_supervision: bool = False) -> DynUNet:
    options = {"filters": [4, 8, 8], "deep_supervision": deep_supervision}
    return DynUNet(2, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2], **options)


def resnet() -> ResNet:
    return ResNet("basic", [1, 1, 1, 1], [4, 8, 8, 8], spatial_dims=2, n_input_channels=1, num_classes=3)


def densenet() -> DenseNet:
    return DenseNet(2, 1, 3, init_features=4, growth_rate=4, block_config=(2, 2))


def segmenter() -> ViTSegmenter:
    return ViTSegmenter(vit(classification=False, num_layers=4), 3, (16, 16))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ViT": (vit, (2, 1, 16, 16)),
    "UNETR": (unetr, (2, 1, 32, 32)),
    "SwinUNETR": (swin_unetr, (2, 1, 64, 64)),
    "UNet": (unet, (2, 1, 16, 16)),
}
TRANSFORMERS = [name for name in NETWORKS if name != "UNet"]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode with weights as after training, and images for it."""
    make, size = NETWORKS[name]
    return shaken(make()).eval(), torch.randn(size)


def shaken(network: Any) -> Any:
    """Biases, scales and statistics that are not at their initial zeros and ones."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return shake_statistics(network)


def output(network: nn.Module, x: Tensor) -> Tensor:
    """The first of the network's outputs."""
    y = network(x)
    return y[0] if isinstance(y, tuple | list) else y


def teach(network: nn.Module, x: Tensor, steps: int = 2, **options: Any) -> nn.Module:
    """A few steps on an arbitrary target; the network is left in evaluation mode."""
    train(network, lambda: output(network, x).square().mean(), steps, **options)
    return network.eval()


def trained_names(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def without_gradient(network: nn.Module) -> set[str]:
    """Names of the parameters that train but have no gradient, or none but zeros, after :func:`teach`."""
    grads = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
    return {name for name, grad in grads.items() if grad is None or not grad.any()}
