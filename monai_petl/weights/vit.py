"""Weights of the backbone of networks around a ``ViT``, from a 2D checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from monai.networks.nets import ViT

from monai_petl.core.switching import backbone_loaded
from monai_petl.networks.vit.attention_bias import RelativePositionBias
from monai_petl.networks.vit.parts import ViTNetwork
from monai_petl.networks.vit.patches import patch_of
from monai_petl.weights.inflation import ViTArchitecture, convert_checkpoint, load_pretrained
from monai_petl.weights.inflation.tensor_rules import Mode

__all__ = ["load_backbone"]

Network = TypeVar("Network", bound=ViTNetwork)


def load_backbone(network: Network, path: str | os.PathLike | None, inflation: Mode = "center") -> Network:
    """Put a 2D checkpoint into the backbone, inflated to its dimensions and image size.

    Args:
        network: a network around a ``ViT`` that it calls ``backbone``, adapted or not; changed in place.
        path: a file or folder that :func:`monai_petl.inflation.read_checkpoint` reads; ``None`` leaves the weights.
        inflation: ``center`` or ``average``.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no vision transformer, or one of other settings; names them.
    """
    if path is None:
        return network
    given = _settings(network.backbone)
    depth = (
        network.backbone_size()[-1] // patch_of(network.backbone.patch_embedding)[-1]
        if len(network.img_size) == 3
        else 1
    )
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
        img_size=network.backbone_size(),
        class_key_bias=bool(given["attention_bias"]) and depth > 1,
    )
    backbone_loaded(network)
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
