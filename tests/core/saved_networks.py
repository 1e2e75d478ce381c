"""Backbones and methods of the adapter files in ``saved/``, which earlier versions of the package have written.

``python -m tests.core.saved_networks FOLDER`` writes such files with the version that is installed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import SwinUNETR, UNet, ViT
from safetensors.torch import save_file
from torch import Tensor, nn

import monai_petl as mp
from monai_petl.methods import EPT, SSF, VPETL, VPT, FFNAdapter, HeadOnly, LoRA, PromptTuning
from monai_petl.networks import PUNet, ViTClassifier

Build = Callable[[], nn.Module]


def vit() -> nn.Module:
    backbone = ViT(
        3, (16, 16), (8, 8), hidden_size=8, mlp_dim=16, num_layers=2, num_heads=2, spatial_dims=2, classification=True
    )
    return ViTClassifier(backbone, 2, (16, 16))


def unet() -> nn.Module:
    return UNet(2, 1, 3, (4, 8), (2,), num_res_units=1)


def swin() -> nn.Module:
    return SwinUNETR(
        in_channels=1, out_channels=2, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), feature_size=12, spatial_dims=2
    )


def punet() -> nn.Module:
    return PUNet(classes=["liver", "kidney"], channels=(8, 8, 16, 16, 24), num_heads=4, tokens_per_class=4)


SAVED: dict[str, tuple[Build, list[Any], list[str], tuple[int, ...]]] = {
    "lora_vit": (vit, [LoRA(rank=2)], ["head"], (1, 3, 16, 16)),
    "dora_unet": (unet, [LoRA(rank=1, targets=["*conv"], dora=True)], [], (1, 1, 16, 16)),
    "lora_head_unet": (unet, [LoRA(rank=1, targets=["*conv"]), HeadOnly(num_classes=2)], [], (1, 1, 16, 16)),
    "ssf_vit": (vit, [SSF()], ["head"], (1, 3, 16, 16)),
    "vpt_vit": (vit, [VPT(num_tokens=2)], ["head"], (1, 3, 16, 16)),
    "ept_vit": (vit, [EPT(num_columns=2)], ["head"], (1, 3, 16, 16)),
    "ffn_vit": (vit, [FFNAdapter(bottleneck=2)], [], (1, 3, 16, 16)),
    "vpetl_swin": (swin, [VPETL()], ["out"], (1, 1, 64, 64)),
    "prompts_punet": (punet, [PromptTuning("kidney")], [], (1, 1, 32, 32, 1)),
}  # fmt: skip


def numbers(shape: torch.Size | tuple[int, ...], first: int = 0) -> Tensor:
    """Fractions that every machine represents in the same bits, between -0.3 and 0.3."""
    return (((torch.arange(first, first + math.prod(shape)) * 37) % 97 - 48) / 160).reshape(shape)


@torch.no_grad()
def backbone(build: Build) -> nn.Module:
    """The network with values that depend on nothing but the shapes of its tensors."""
    network = build().eval()
    for place, (name, tensor) in enumerate(network.state_dict().items()):
        if tensor.is_floating_point():
            tensor.copy_(numbers(tensor.shape, place) + (1.0 if name.endswith(("running_var", "norm.weight")) else 0.0))
    return network


def output(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Of a picture of fractions, flat; at most a thousand numbers."""
    with torch.no_grad():
        found = network.eval()(numbers(shape))
    found = found.logits if hasattr(found, "logits") else found[0] if isinstance(found, tuple) else found
    flat = found.flatten()
    return flat[:: max(len(flat) // 1000, 1)].clone()


def main(folder: Path) -> None:
    """Write a file and its expected output for each entry of :data:`SAVED`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (build, methods, also_train, shape) in SAVED.items():
        network = mp.adapt(backbone(build), methods, also_train, "task")
        with torch.no_grad():
            for place, tensor in enumerate(mp.trainable_parameters(network)):
                tensor.copy_(numbers(tensor.shape, place) * 0.5)
        mp.save_adapter(network, folder / f"{name}.safetensors", notes="numbers of no meaning")
        save_file({"output": output(network, shape)}, folder / f"{name}.expected")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
