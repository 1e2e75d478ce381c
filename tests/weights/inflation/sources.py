"""Small random 2D checkpoints under the names of other libraries."""

from __future__ import annotations

import torch
from monai.networks.nets import ResNet
from torch import Tensor


def timm_vit(
    hidden: int = 24, layers: int = 2, patch: int = 4, grid: tuple[int, int] = (4, 4), class_token: bool = True
) -> dict[str, Tensor]:
    """A vision transformer without head; four times as wide in the MLP."""
    entries = grid[0] * grid[1] + class_token
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": (hidden, 3, patch, patch)}
    for i in range(layers):
        shapes[f"blocks.{i}.attn.qkv"] = (3 * hidden, hidden)
        shapes[f"blocks.{i}.attn.proj"] = (hidden, hidden)
        shapes[f"blocks.{i}.mlp.fc1"] = (4 * hidden, hidden)
        shapes[f"blocks.{i}.mlp.fc2"] = (hidden, 4 * hidden)
    state = _linear(shapes)
    for name in ["norm", *(f"blocks.{i}.norm{n}" for i in range(layers) for n in (1, 2))]:
        state |= _norm(name, hidden)
    state["pos_embed"] = torch.randn(1, entries, hidden)
    return {**state, "cls_token": torch.randn(1, 1, hidden)} if class_token else state


def timm_swin(
    embed: int = 12, window: int = 3, patch: int = 4, heads: tuple[int, ...] = (2, 2, 4, 4)
) -> dict[str, Tensor]:
    """A Swin transformer with two blocks a stage."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": (embed, 3, patch, patch)}
    norms, rest = {"patch_embed.norm": embed, "norm": 8 * embed}, {}
    for s in range(4):
        dim = embed * 2**s
        for b in (f"layers.{s}.blocks.{i}" for i in range(2)):
            shapes |= {f"{b}.attn.qkv": (3 * dim, dim), f"{b}.attn.proj": (dim, dim)}
            shapes |= {f"{b}.mlp.fc1": (4 * dim, dim), f"{b}.mlp.fc2": (dim, 4 * dim)}
            norms |= {f"{b}.norm1": dim, f"{b}.norm2": dim}
            rest[f"{b}.attn.relative_position_bias_table"] = torch.randn((2 * window - 1) ** 2, heads[s])
        if s:
            norms[f"layers.{s}.downsample.norm"] = 2 * dim
            rest[f"layers.{s}.downsample.reduction.weight"] = torch.randn(dim, 2 * dim) * (2 * dim) ** -0.5
    state = _linear(shapes)
    for name, dim in norms.items():
        state |= _norm(name, dim)
    return {**state, **rest}


def resnet(block: str = "basic") -> dict[str, Tensor]:
    """A narrow ResNet with one block a stage and running statistics as after some training."""
    network = ResNet(
        block, [1, 1, 1, 1], [4, 6, 8, 8], spatial_dims=2, conv1_t_stride=2, bias_downsample=False, num_classes=3
    )
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif "bn" in name and value.is_floating_point():
            value.normal_(1 if name.endswith("weight") else 0, 0.2)
    return state


def _linear(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    state = {}
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel()
        state[f"{name}.weight"] = torch.randn(shape) * fan_in**-0.5
        state[f"{name}.bias"] = torch.randn(shape[0]) * 0.2
    return state


def _norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.2 * torch.randn(width), f"{name}.bias": 0.2 * torch.randn(width)}
