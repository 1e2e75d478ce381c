"""Pre-trained weights of a ``SwinUNETR``: whole networks, its transformer alone, self-supervised checkpoints of MONAI's."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping

from monai.networks.nets import SwinUNETR
from torch import Tensor

from monai_petl.core.switching import backbone_loaded
from monai_petl.weights.state_files import read_state_dict, tensors_of, under_prefix

__all__ = ["load_swin_unetr"]

logger = logging.getLogger(__name__)


def load_swin_unetr(network: SwinUNETR, path: str | os.PathLike | None) -> SwinUNETR:
    """Put pre-trained weights into a ``SwinUNETR``, adapted or not.

    Args:
        network: changed in place.
        path: a state dict of a ``SwinUNETR`` (whole, with any number of classes: an output convolution of another size
            stays as it is), of its ``swinViT`` alone, or a self-supervised checkpoint of MONAI's (``swin_vit.`` or ``swinViT.``
            names, with heads beside); under any prefix (``module.``, ``model.``, ``backbone.``, ``encoder.``, ...), possibly
            below ``state_dict`` or ``model``. ``None`` leaves the weights.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not fit; names the tensors.
    """
    if path is None:
        return network
    state = tensors_of(read_state_dict(path, "Give the backbone's place as --pretrained_path"), path)
    state = {_monai_name(n): t for n, t in state.items()}
    if any("deltas" in n.split(".") for n in state):
        raise ValueError(
            f"{path} is an adapted network; fold its adapter in with merge_and_unload(network) and save that, or "
            "take the file that it was trained from"
        )
    own = {n: t for n, t in network.state_dict().items() if "deltas" not in n.split(".")}
    state, beside = under_prefix(state, {*own, *(n.removeprefix("swinViT.") for n in own)}, path)
    if not any(n.startswith("swinViT.") for n in state):
        state = {f"swinViT.{n}": t for n, t in state.items()}
    alone = not any(n in own and not n.startswith("swinViT.") for n in state)
    pretext = [n for n in state if n not in own and _is_pretext(n)]
    head = [n for n in state if n.startswith("out.") and n in own and state[n].shape != own[n].shape]
    given = {n: t for n, t in state.items() if n not in head and n not in pretext}
    wanted = [n for n in own if n.startswith("swinViT.") or not (alone or n.startswith("out."))]
    _require_fit(path, {n: own[n] for n in wanted}, given, own)
    network.load_state_dict(given, strict=False)
    backbone_loaded(network)
    if alone and not all(p.requires_grad for p in network.decoder1.parameters()):
        logger.warning(
            "%s holds the transformer alone, and the decoder is random and does not train; add 'encoder*' and 'decoder*' to "
            "also_train",
            path,
        )
    left_out = {
        "of self-supervised heads": pretext,
        "of a head of other classes": head,
        "outside of the network": beside,
    }
    logger.info(
        "%s: loaded %d tensors (%s); left out %s; starts anew: %s",
        path,
        len(given),
        "the transformer" if alone else "the whole network",
        "; ".join(f"{len(names)} {what} ({', '.join(names)})" for what, names in left_out.items() if names)
        or "nothing",
        ", ".join(sorted({n.split(".")[0] for n in own if n not in given})) or "nothing",
    )
    return network


def _require_fit(
    path: str | os.PathLike, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    missing, extra = [n for n in wanted if n not in given], [n for n in given if n not in own]
    other = [n for n in given if n in own and given[n].shape != own[n].shape]
    if other:
        name = other[0]
        there, here = tuple(given[name].shape), tuple(own[name].shape)
        raise ValueError(
            f"{path} does not fit this SwinUNETR: {len(other)} tensors have another shape, first {name}, {there} in the file "
            f"and {here} here. The file has {_settings(given)}, the network {_settings(own)}; give those that it was trained "
            "with"
        )
    kinds = ((missing, "missing"), (extra, "left over"))
    parts = [f"{len(names)} tensors are {what} ({', '.join(names[:3])})" for names, what in kinds if names]
    if parts:
        raise ValueError(
            f"{path} does not fit this SwinUNETR: {' and '.join(parts)}. The file has {_settings(given)}, the network "
            f"{_settings(own)}; it must hold a SwinUNETR of these, or its transformer (swinViT or swin_vit), alone or with "
            "self-supervised heads"
        )


def _settings(state: Mapping[str, Tensor]) -> str:
    """What the tensors tell of a SwinUNETR's arguments."""
    blocks = {found.groups() for n in state if (found := re.match(r"swinViT\.layers(\d)\.0\.blocks\.(\d+)\.", n))}
    stages = Counter(stage for stage, _ in sorted(blocks))
    patches = state.get("swinViT.patch_embed.proj.weight")
    if patches is None or not stages:
        return "no transformer of a SwinUNETR"
    tables = [state.get(f"swinViT.layers{stage}.0.blocks.0.attn.relative_position_bias_table") for stage in stages]
    heads = [None if table is None else table.shape[1] for table in tables]
    v2 = ", use_v2=True" if any(n.startswith("swinViT.layers1c.") for n in state) else ""
    return (
        f"feature_size {patches.shape[0]}, depths {tuple(stages.values())}, num_heads {tuple(heads)}, "
        f"in_channels {patches.shape[1]}, spatial_dims {patches.ndim - 2}{v2}"
    )


def _monai_name(name: str) -> str:
    """Names of MONAI's self-supervised checkpoints in those of the network."""
    parts = ["swinViT" if part == "swin_vit" else part for part in name.split(".")]
    return ".".join(parts).replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")


def _is_pretext(name: str) -> bool:
    """Heads of self-supervised training, which a segmentation network has not got."""
    return name.removeprefix("swinViT.").startswith(("rotation_head.", "contrastive_head.", "conv.", "norm."))
