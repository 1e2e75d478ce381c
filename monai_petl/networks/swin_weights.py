"""Pre-trained weights of a ``SwinUNETR``: whole networks, its transformer alone, self-supervised checkpoints of MONAI's."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from monai.networks.nets import SwinUNETR
from torch import Tensor

from monai_petl.networks.state_files import plain_names, read_state_dict, tensors_of
from monai_petl.switching import backbone_loaded

__all__ = ["load_swin_unetr"]

logger = logging.getLogger(__name__)


def load_swin_unetr(network: SwinUNETR, path: str | os.PathLike | None) -> SwinUNETR:
    """Put pre-trained weights into a ``SwinUNETR``, adapted or not.

    Args:
        network: changed in place.
        path: a state dict of a ``SwinUNETR`` (whole, with any number of classes: an output convolution of another size
            stays as it is), of its ``swinViT`` alone, or a self-supervised checkpoint of MONAI's (``swin_vit.`` or ``swinViT.``
            names, with heads beside); with the names of wrappers, possibly below ``state_dict`` or ``model``. ``None``
            leaves the weights.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not fit; names the tensors.
    """
    if path is None:
        return network
    state = tensors_of(read_state_dict(path, "Give the backbone's place as --pretrained_path"))
    state = {_monai_name(n): t for n, t in plain_names(state).items()}
    if any("deltas" in n.split(".") for n in state):
        raise ValueError(
            f"{path} is an adapted network; fold its adapter in with merge_and_unload(network) and save that, or "
            "take the file that it was trained from"
        )
    own = {n: t for n, t in network.state_dict().items() if "deltas" not in n.split(".")}
    if not any(n.startswith("swinViT.") for n in state):
        state = {f"swinViT.{n}": t for n, t in state.items()}
    alone = not any(n in own and not n.startswith("swinViT.") for n in state)
    left_out = [n for n in state if n not in own and _is_pretext(n)]
    head = [n for n in state if n.startswith("out.") and n in own and state[n].shape != own[n].shape]
    given = {n: t for n, t in state.items() if n not in head and n not in left_out}
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
    anew = sorted({n.split(".")[0] for n in own if n not in given})
    logger.info(
        "%s: loaded %d tensors (%s); left out %s; starts anew: %s",
        path,
        len(given),
        "the transformer" if alone else "the whole network",
        f"{len(left_out)} of self-supervised heads ({', '.join(left_out)})" if left_out else "nothing",
        ", ".join(anew) or "nothing",
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
            f"and {here} here. Give the feature_size, depths, num_heads and in_channels that it was trained with"
        )
    kinds = ((missing, "missing"), (extra, "left over"))
    parts = [f"{len(names)} tensors are {what} ({', '.join(names[:3])})" for names, what in kinds if names]
    if parts:
        raise ValueError(
            f"{path} does not fit this SwinUNETR: {' and '.join(parts)}. It must hold a SwinUNETR of these depths, or its "
            "transformer (swinViT or swin_vit), alone or with self-supervised heads"
        )


def _monai_name(name: str) -> str:
    """Names of MONAI's self-supervised checkpoints in those of the network."""
    name = f"swinViT.{name.removeprefix('swin_vit.')}" if name.startswith("swin_vit.") else name
    return name.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")


def _is_pretext(name: str) -> bool:
    """Heads of self-supervised training, which a segmentation network has not got."""
    return name.removeprefix("swinViT.").startswith(("rotation_head.", "contrastive_head.", "conv.", "norm."))
