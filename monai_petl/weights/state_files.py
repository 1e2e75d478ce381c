"""Networks as MONAI and this package save them: flat state dicts, never code."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from monai_petl.files.tensor_files import log_left_out
from monai_petl.files.torch_files import TorchFileError, read_torch, write_state

__all__ = ["read_contents", "read_state_dict", "save_network", "tensors_of", "under_prefix"]

BELOW = ("state_dict", "model", "model_state_dict", "network_weights", "net", "network", "student", "teacher")


def read_state_dict(path: str | os.PathLike, hint: str) -> Mapping[str, Any]:
    """The tensors in a file by name; of a checkpoint, those of its ``model``.

    Args:
        path: a state dict (``model.pt``), read without executing code (``weights_only``).
        hint: what to do when there is no such file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    state = read_contents(path, hint)
    if isinstance(state.get("model"), Mapping):
        log_left_out(path, state, "model")
        return state["model"]
    return state


def read_contents(path: str | os.PathLike, hint: str) -> Mapping[str, Any]:
    """All that a file of ``torch.save`` holds, where that is a table; see :func:`read_state_dict`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no pre-trained network at {path}. {hint}")
    try:
        state = read_torch(path)
    except TorchFileError:
        raise
    except pickle.UnpicklingError:  # torch's own advice is to execute what the file holds
        raise ValueError(
            f"{path} is no state dict of tensors: it holds Python objects, which could run code, or is no file of torch.save. "
            "Save network.state_dict() and give that file"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be read as a state dict, it may be damaged or truncated ({reason}). Copy or download it again"
        ) from None
    return state if isinstance(state, Mapping) else {}


def tensors_of(contents: Mapping[str, Any], path: str | os.PathLike) -> Mapping[str, Tensor]:
    """The state dict of a checkpoint, which may lie below one of the usual keys; what else holds tensors is logged."""
    for key in BELOW:
        inside = contents.get(key)
        if isinstance(inside, Mapping) and any(isinstance(value, Tensor) for value in inside.values()):
            log_left_out(path, contents, key)
            return {name: value for name, value in inside.items() if isinstance(value, Tensor)}
    return {name: value for name, value in contents.items() if isinstance(value, Tensor)}


def under_prefix(
    state: Mapping[str, Tensor], known: Iterable[str], path: str | os.PathLike
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a network, without what wrappers put before their names (``module.``, ``model.``, ``backbone.``, ...).

    Args:
        state: names and tensors of a file.
        known: names of the network that is looked for. The prefix is what stands before most of them.
        path: the file, for the error.

    Returns:
        What lies under the prefix, by names without it, and the names of all else. Everything, and nothing, when no name is
        known.

    Raises:
        ValueError: the network is there more than once, such as under ``student.`` and ``teacher.``.
    """
    known = {*known}
    found: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        place = next((i for i in range(len(parts)) if ".".join(parts[i:]) in known), None)
        if place is not None:
            found["".join(f"{part}." for part in parts[:place])] += 1
    most = max(found.values(), default=0)
    prefixes = [prefix for prefix, count in found.items() if 2 * count > most]
    if len(prefixes) > 1:
        raise ValueError(
            f"{path} holds the network {len(prefixes)} times, under {' and '.join(repr(p) for p in prefixes)}; save the "
            "tensors of one of them and give that file"
        )
    prefix = prefixes[0] if prefixes else ""
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return inside, [name for name in state if not name.startswith(prefix)]


def save_network(network: nn.Module, path: str | os.PathLike) -> Path:
    """Write a network's flat state dict, as ``models/model.pt`` of a bundle has to be; whole or not at all.

    Args:
        network: as it is; its adapters' tensors are among those written.
        path: missing folders are made.

    Returns:
        The path.

    Raises:
        OSError: it cannot be written.
    """
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    return write_state(path, state, "the network")
