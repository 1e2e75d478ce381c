"""Weights of PUNet from files: a whole network, and adapters of single classes, possibly from different people."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from monai_petl.core.adapters import inspect_adapter, load_adapter
from monai_petl.core.records import adapters_of
from monai_petl.core.switching import remove_adapter
from monai_petl.networks.punet.network import PUNet
from monai_petl.weights.state_files import read_state_dict

__all__ = ["load_punet", "load_punet_backbone"]

logger = logging.getLogger(__name__)
CLASS_PREFIX = "prompts.classes."


def load_punet_backbone(network: PUNet, path: str | os.PathLike) -> list[str]:
    """Load body, background tokens and the prompts of the classes that network and file have in common.

    Args:
        network: changed in place.
        path: a state dict (``model.pt``), read without executing code (``weights_only``).

    Returns:
        The classes whose prompts the file holds. Those that the network has not got are left out; all that is left out or
        starts anew is logged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or does not fit; names the tensors.
    """
    state = read_state_dict(
        path,
        "Run the bundle's pretrain.json first, or give its place as --ckpt_path or --pretrained_path",
    )
    own = network.state_dict()
    shared = [n for n in own if not n.startswith((CLASS_PREFIX, "heads."))]
    held = list(dict.fromkeys(n.split(".")[2] for n in state if n.startswith(CLASS_PREFIX)))
    wanted = shared + [n for c in held for n in own if n.startswith(f"{CLASS_PREFIX}{c}.")]
    wrong = [n for n in wanted if not isinstance(state.get(n), Tensor) or state[n].shape != own[n].shape]
    if wrong:
        raise ValueError(
            f"{path} does not fit this PUNet: {len(wrong)} of {len(wanted)} tensors are missing or have another shape "
            f"({', '.join(wrong[:3])}). Use the network settings that the file was trained with"
        )
    network.load_state_dict({n: state[n] for n in wanted}, strict=False)
    _account(path, state, own, wanted)
    return held


def _account(
    path: str | os.PathLike, state: Mapping[str, object], own: Mapping[str, Tensor], wanted: Sequence[str]
) -> None:
    """Say what of the file is left out and what of the network keeps its values; warn of names that no PUNet has."""
    left_out = [n for n in state if n not in own]
    classes = dict.fromkeys(n.split(".")[2] for n in left_out if n.startswith(CLASS_PREFIX))
    heads = [n for n in state if n.startswith("heads.")]
    unknown = [n for n in left_out if not n.startswith((CLASS_PREFIX, "heads."))]
    anew = dict.fromkeys(".".join(n.split(".")[:3]) for n in own if n not in wanted)
    logger.info(
        "%s: loaded %d tensors; left out classes %s and %d tensors of heads; keeps its values: %s",
        path,
        len(wanted),
        ", ".join(classes) or "none",
        len(heads),
        ", ".join(anew) or "nothing",
    )
    if unknown:
        logger.warning(
            "%s: %d tensors are not of a PUNet and are left out: %s", path, len(unknown), ", ".join(unknown[:5])
        )


def load_punet(
    network: PUNet,
    path: str | os.PathLike,
    classes: Sequence[str] | None = None,
    adapter_dir: str | os.PathLike | None = None,
    adapters: Mapping[str, str] | None = None,
) -> PUNet:
    """A network that segments ``classes``: the backbone of one file, each class from its adapter file or from that file.

    Args:
        network: changed in place.
        path: state dict of a pre-trained network.
        classes: what to segment, in order of the output channels 1, 2, ...; default all classes of the network.
        adapter_dir: where ``<class>.safetensors`` may lie; a file there goes before what ``path`` holds.
        adapters: class -> adapter file, where it lies elsewhere.

    Returns:
        The network, with ``active_classes`` set.

    Raises:
        FileNotFoundError: ``path`` or a file of ``adapters`` is missing.
        ValueError: a file does not fit, a class has weights in none of the files, or a file that changes the body is to
            be used together with other classes.
    """
    classes = list(classes if classes is not None else network.classes)
    found = load_punet_backbone(network, path)
    files = {name: Path(file) for name, file in (adapters or {}).items()}
    unknown = [name for name in files if name not in classes]
    if unknown:
        raise ValueError(f"adapters names the class {unknown[0]!r}, which is not among the classes {classes}")
    for name in classes:
        file = files.get(name)
        if file is None and adapter_dir is not None and (Path(adapter_dir) / f"{name}.safetensors").is_file():
            file = Path(adapter_dir) / f"{name}.safetensors"
        if file is not None:
            if len(classes) > 1 and not _is_of_classes_alone(file):
                raise ValueError(
                    f"{file} trained tensors that all classes share, so it can segment {name!r} only; give this class "
                    "alone, or train it with prompts"
                )
            _replace_class(network, name, file)
            logger.info("class %s: %s", name, file)
        elif name not in found:
            raise ValueError(
                f"class {name!r} has no weights: {path} holds {', '.join(found) or 'no class'}, and there is no adapter file "
                f"{name}.safetensors in {adapter_dir or 'adapter_dir'}. Train it with train.json, or leave it out"
            )
    network.active_classes = classes
    return network


def _is_of_classes_alone(file: Path) -> bool:
    """Whether all tensors of the adapter belong to a class, so that other classes do not notice it."""
    return all(n.startswith((CLASS_PREFIX, "heads.")) for n in inspect_adapter(file)["shapes"])


def _replace_class(network: PUNet, name: str, file: Path) -> None:
    if name in adapters_of(network):
        remove_adapter(network, name)
    if name in network.prompts.names:
        network.prompts.remove_class(name)
    load_adapter(network, file, name=name)
    if name not in network.classes:
        raise ValueError(f"{file} is not an adapter of the class {name!r}; it brings: {', '.join(network.classes)}")
