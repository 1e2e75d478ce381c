"""Weights of a ViTSegmenter from files: an inflated 2D backbone, a whole network, or an adapter on that backbone."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from monai.networks.nets import ViT
from torch import Tensor

from monai_petl.adapters import load_adapter
from monai_petl.inflation import ViTArchitecture, convert_checkpoint, load_pretrained
from monai_petl.inflation.attention_bias import RelativePositionBias, add_attention_bias
from monai_petl.inflation.files import set_eps
from monai_petl.inflation.options import patch_of
from monai_petl.inflation.tensor_rules import Mode
from monai_petl.networks.state_files import read_state_dict
from monai_petl.networks.vit_segmenter import ViTSegmenter

__all__ = ["load_backbone", "load_segmenter", "vit_backbone"]

logger = logging.getLogger(__name__)


def vit_backbone(
    in_channels: int,
    img_size: Sequence[int],
    patch_size: Sequence[int],
    *,
    hidden_size: int = 768,
    mlp_dim: int = 3072,
    num_layers: int = 12,
    num_heads: int = 12,
    norm_eps: float = 1e-6,
    class_token: bool = True,
    attention_bias: str | None = None,
) -> ViT:
    """A MONAI ``ViT`` with random weights into which an inflated checkpoint of this architecture fits.

    Args:
        in_channels, img_size, patch_size, hidden_size, mlp_dim, num_layers, num_heads: as in ``ViT``.
        norm_eps: epsilon of the layer norms, of which ``ViT`` has no argument.
        class_token: whether there is one.
        attention_bias: ``"table"`` for relative positions (BEiT), ``"class_key"`` for several patches along depth beside
            a class token (nothing for a single one), or none.
    """
    vit = ViT(
        in_channels,
        img_size,
        patch_size,
        hidden_size,
        mlp_dim,
        num_layers,
        num_heads,
        classification=class_token,
        spatial_dims=len(img_size),
        qkv_bias=True,
    )
    set_eps(vit, norm_eps)
    grid = [extent // side for extent, side in zip(img_size, patch_size, strict=True)]
    if attention_bias == "table" or (attention_bias and len(grid) == 3 and grid[-1] > 1):
        add_attention_bias(vit, attention_bias, grid, num_heads, depth=grid[-1])
    return vit


def load_backbone(network: ViTSegmenter, path: str | os.PathLike, inflation: Mode = "center") -> ViTSegmenter:
    """Put a 2D checkpoint into the backbone, inflated to its dimensions and image size.

    Args:
        network: changed in place.
        path: a file or folder that :func:`monai_petl.inflation.read_checkpoint` reads.
        inflation: ``center`` or ``average``.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no vision transformer, or one of other settings; names them.
    """
    given = _settings(network.backbone)
    depth = network.img_size[-1] // patch_of(network.backbone.patch_embedding)[-1] if len(network.img_size) == 3 else 1
    converted = convert_checkpoint(path)
    source = converted.architecture
    if not isinstance(source, ViTArchitecture):
        raise ValueError(f"{path} holds a {source.kind}, a vision transformer is needed")
    found = {name: getattr(source, name) for name in given if getattr(source, name, None) is not None}
    found["norm_eps"] = source.eps
    if source.relative_bias or given["attention_bias"] == "table":
        found["attention_bias"] = "table" if source.relative_bias else None
    other = {name: value for name, value in found.items() if given[name] != value}
    if other:
        raise ValueError(
            f"{path} does not fit the network's settings: it has {_listed(other)}, the network "
            f"{_listed({name: given[name] for name in other})}. Give the file's to all commands"
        )
    load_pretrained(
        network,
        converted,
        inflation,
        img_size=network.img_size,
        class_key_bias=bool(given["attention_bias"]) and depth > 1,
    )
    return network


def load_segmenter(
    network: ViTSegmenter,
    path: str | os.PathLike,
    *,
    adapter_path: str | os.PathLike | None = None,
    pretrained_path: str | os.PathLike | None = None,
    inflation: Mode = "center",
) -> ViTSegmenter:
    """Load a trained network: from its own file, or as an adapter on the backbone that it was trained on.

    Args:
        network: changed in place.
        path: state dict of the whole network; not read when there is an adapter.
        adapter_path: the adapter's file.
        pretrained_path, inflation: the backbone below the adapter, see :func:`load_backbone`.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit; names the tensors.
    """
    if adapter_path is not None:
        if pretrained_path is not None:
            load_backbone(network, pretrained_path, inflation)
        load_adapter(network, adapter_path)
        logger.info("adapter %s on %s", adapter_path, pretrained_path)
        return network
    state = read_state_dict(path, "Run the bundle's train.json first, or give its place as --ckpt_path")
    own = network.state_dict()
    wrong = [n for n in own if not isinstance(state.get(n), Tensor) or state[n].shape != own[n].shape]
    wrong += [n for n in state if n not in own]
    if wrong:
        raise ValueError(
            f"{path} does not fit this ViTSegmenter: {len(wrong)} tensors are missing, left over or of another shape "
            f"({', '.join(wrong[:3])}). Use the network settings that the file was trained with"
        )
    network.load_state_dict(state)
    return network


def _settings(vit: ViT) -> dict[str, Any]:
    """What a checkpoint and a transformer need to have in common, under the names of :func:`vit_backbone`."""
    hook = vit.blocks[0].attn.rel_positional_embedding
    return {
        "hidden_size": vit.norm.normalized_shape[0],
        "mlp_dim": vit.blocks[0].mlp.linear1.out_features,
        "num_layers": len(vit.blocks),
        "num_heads": vit.blocks[0].attn.num_heads,
        "class_token": hasattr(vit, "cls_token"),
        "norm_eps": vit.norm.eps,
        "attention_bias": None if hook is None else "table" if isinstance(hook, RelativePositionBias) else "class_key",
    }


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
