"""Any pre-trained network from its file: whose it is, what it needs, and every tensor accounted for."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from monai_petl.files.atomic import write_text
from monai_petl.files.tensor_files import write_tensors
from monai_petl.weights.account import Account, Entry, shortened
from monai_petl.weights.bundle_folders import is_bundle, network_of_bundle
from monai_petl.weights.checkpoint_files import Checkpoint, read_tensors
from monai_petl.weights.family import Family, Published

__all__ = ["convert_backbone", "identify", "load_backbone", "published"]

logger = logging.getLogger(__name__)


def load_backbone(path: str | os.PathLike, **arguments: Any) -> nn.Module:
    """The network of a checkpoint, built with the arguments that the file tells, with its weights.

    Args:
        path: a safetensors file, one of ``torch.save`` (read without running code), or a bundle's folder.
        arguments: of the network, where they differ from the file's (``in_channels``, ``out_channels``) or where the file does
            not tell them. Other input channels: the first convolution's weights are averaged over the file's channels and
            repeated, so that an image in all channels gives what it gave. Other output channels: the head starts anew.

    Returns:
        The network, in evaluation mode. What starts anew, and what of the file is left out, is logged at WARNING.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no family knows the file; an argument is needed that it does not tell; or it lacks tensors or has others
            of a wrong shape. Names them.

    Example::

        network = monai_petl.load_backbone("VoComni_B.pt", in_channels=4, out_channels=3)
    """
    if is_bundle(path):
        return network_of_bundle(path, **arguments)
    checkpoint = read_tensors(path)
    network, account, state = _match(checkpoint, arguments)
    network.load_state_dict(state, strict=False)
    _say(account)
    return network.eval()


def identify(path: str | os.PathLike, **arguments: Any) -> Account:
    """What a checkpoint is: its family, its network's arguments, and the fate of every tensor. Nothing is loaded.

    Args:
        path, arguments: as in :func:`load_backbone`.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_backbone`.
    """
    return _match(read_tensors(path), arguments)[1]


def convert_backbone(path: str | os.PathLike, out: str | os.PathLike, **arguments: Any) -> Account:
    """Write what a checkpoint has of its network under the network's own names, and the account beside it.

    Args:
        path, arguments: as in :func:`load_backbone`.
        out: ``.safetensors`` file to write; the account goes to ``<out>.json``. :func:`load_backbone` reads it.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_backbone`; or ``out`` has another ending.
        OSError: the place cannot be written to.
    """
    target = Path(out)
    if target.suffix != ".safetensors":
        raise ValueError(f"the file to write must end in .safetensors, got {target}")
    _, account, state = _match(read_tensors(path), arguments)
    write_tensors(
        out, {name: tensor.clone() for name, tensor in state.items()}, {"family": account.family}, "the network"
    )
    write_text(
        target.with_name(f"{target.name}.json"),
        json.dumps(account.to_dict(), indent=4, default=str) + "\n",
        "the account",
    )
    return account


def published() -> list[tuple[str, Published]]:
    """Checkpoints that can be had: title of the family, and what is known of each."""
    return [(family.title, one) for family in Family.registry for one in family.published]


def _match(checkpoint: Checkpoint, given: Mapping[str, Any]) -> tuple[nn.Module, Account, dict[str, Tensor]]:
    """Network, account, and the tensors to load."""
    family, names = _family_of(checkpoint)
    tensors = {names[n]: family.tensor(names[n], t) for n, t in checkpoint.tensors.items() if n in names}
    try:
        arguments = {**family.arguments(tensors), **given}
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{checkpoint.path} is of the family {family.title} and lacks a tensor that tells its sizes: {error}. Get the "
            "complete file"
        ) from None
    try:
        network = family.build(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{checkpoint.path} is of the family {family.title}, and its file does not tell all: {error}"
        ) from None
    except (ValueError, RuntimeError, IndexError, AssertionError) as error:
        raise ValueError(
            f"{checkpoint.path} does not fit: no {family.title} can be built with {_options(arguments)}: {error}"
        ) from error
    own = network.state_dict()
    fates = {n: Entry(n, "left out", family.left_out(n)) for n in checkpoint.tensors}
    fates |= {n: Entry(n, "left out", why) for n, why in checkpoint.beside.items()}
    state, wrong, heads = {}, [], []
    for there, name in names.items():
        tensor = tensors[name]
        if name not in own:
            continue
        if name in family.inputs and tensor.shape != own[name].shape:
            tensor = _other_channels(tensor, own[name].shape[1])
        if tensor.shape == own[name].shape:
            state[name] = tensor
            fates[there] = Entry(there, "loaded", name if name != there else "")
        elif name.startswith(family.head):
            heads.append(name)
            fates[there] = Entry(there, "left out", "the head is for other classes")
        else:
            wrong.append(f"{there} has shape {list(tensor.shape)}, the network needs {list(own[name].shape)}")
    if wrong:
        raise ValueError(
            f"{checkpoint.path} does not fit {type(network).__name__}({_options(arguments)}): {'; '.join(wrong[:3])}"
        )
    missing = [n for n in own if n not in state]
    anew = family.anew([n for n in missing if n not in heads]) | dict.fromkeys(heads, "the head is for other classes")
    lacking = [n for n in missing if n not in anew]
    if lacking:
        raise ValueError(
            f"{checkpoint.path} lacks {len(lacking)} tensors of {type(network).__name__}({_options(arguments)}): "
            f"{', '.join(lacking[:3])}. Get the complete file, or give the arguments that it was trained with"
        )
    entries = [*fates.values(), *(Entry(n, "starts anew", anew[n]) for n in missing)]
    kind = type(network).__name__
    return network, Account(str(checkpoint.path), family.title, kind, arguments, entries, family.note()), state


def _family_of(checkpoint: Checkpoint) -> tuple[Family, dict[str, str]]:
    found = [(family, names) for kind in Family.registry if (names := (family := kind()).names(checkpoint.tensors))]
    if not found:
        known = ", ".join(kind.title for kind in Family.registry)
        raise ValueError(
            f"{checkpoint.path} is of no family that is known here ({known}): its {len(checkpoint.tensors)} tensors begin with "
            f"{shortened(checkpoint.tensors)}. Build the network yourself and load its state dict"
        )
    return max(found, key=lambda one: len(one[1]))


def _other_channels(weight: Tensor, channels: int) -> Tensor:
    """The first convolution for other input channels; an image repeated over them gives what its mean over the file's gave."""
    return weight.sum(1, keepdim=True).expand(-1, channels, *weight.shape[2:]) / channels


def _options(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _say(account: Account) -> None:
    left, anew = account.of("left out"), account.of("starts anew")
    logger.info("%s: %s, %d tensors loaded", account.path, account.family, len(account.of("loaded")))
    if left or anew or account.note:
        logger.warning("%s", account)
