"""Pre-trained weights of a ``SwinUNETR``: whole networks, its transformer alone, self-supervised checkpoints of MONAI's."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, cast

from monai.networks.nets import SwinUNETR
from torch import Tensor

from monai_petl.networks.state_files import read_state_dict
from monai_petl.switching import backbone_loaded

__all__ = ["load_swin_unetr"]

logger = logging.getLogger(__name__)


def load_swin_unetr(network: SwinUNETR, path: str | os.PathLike | None) -> SwinUNETR:
    """Put pre-trained weights into a ``SwinUNETR``, adapted or not.

    Args:
        network: changed in place.
        path: a state dict of a ``SwinUNETR`` (whole, with any number of classes: an output convolution of another size
            stays as it is), of its ``swinViT`` alone, or a self-supervised checkpoint of MONAI's (``module.`` names);
            possibly below ``state_dict`` or ``model``. ``None`` leaves the weights.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not fit; names the tensors.
    """
    if path is None:
        return network
    state = {
        _monai_name(n): t
        for n, t in _tensors(read_state_dict(path, "Give the backbone's place as --pretrained_path")).items()
    }
    if any("deltas" in n.split(".") for n in state):
        raise ValueError(
            f"{path} is an adapted network; fold its adapter in with merge_and_unload(network) and save that, or "
            "take the file that it was trained from"
        )
    own = {n: t for n, t in network.state_dict().items() if "deltas" not in n.split(".")}
    part = "swinViT." if not any(n.startswith("swinViT.") for n in state) else ""
    state = {f"{part}{n}": t for n, t in state.items()}
    head = [n for n in state if n.startswith("out.") and n in own and state[n].shape != own[n].shape]
    given = {n: t for n, t in state.items() if n not in head}
    wanted = [n for n in own if n.startswith(part) and not n.startswith("out.")]
    wrong = [n for n in wanted if n not in given or given[n].shape != own[n].shape]
    wrong += [n for n in given if n not in own and not _is_pretext(n)]
    if wrong:
        raise ValueError(
            f"{path} does not fit this SwinUNETR: {len(wrong)} tensors are missing, left over or of another shape "
            f"({', '.join(wrong[:3])}). Give the feature_size and in_channels that it was trained with"
        )
    network.load_state_dict({n: t for n, t in given.items() if n in own}, strict=False)
    backbone_loaded(network)
    if part and not all(p.requires_grad for p in network.decoder1.parameters()):
        logger.warning(
            "%s holds the transformer alone, and the decoder is random and does not train; add 'encoder*' and 'decoder*' to "
            "also_train",
            path,
        )
    logger.info("%s: %d tensors, %s", path, len(given), "a new output convolution" if head else "the whole network")
    return network


def _tensors(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            return cast(Mapping[str, Tensor], state[key])
    return state


def _monai_name(name: str) -> str:
    """Names of MONAI's self-supervised checkpoints in those of the network."""
    return name.removeprefix("module.").replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")


def _is_pretext(name: str) -> bool:
    """Heads of self-supervised training, which a segmentation network has not got."""
    return name.removeprefix("swinViT.").startswith(("rotation_head.", "contrastive_head.", "conv.", "norm."))
