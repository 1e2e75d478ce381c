"""Networks as MONAI and this package save them: flat state dicts, never code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from monai_petl.torch_files import TorchFileError, read_torch, write_state

__all__ = ["plain_names", "read_state_dict", "save_network", "tensors_of"]

BELOW = ("state_dict", "model", "model_state_dict", "network_weights", "net", "network", "student", "teacher")
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.", "_forward_module.")


def read_state_dict(path: str | os.PathLike, hint: str) -> Mapping[str, Any]:
    """The tensors in a file by name; of a checkpoint, those of its ``model``.

    Args:
        path: a state dict (``model.pt``), read without executing code (``weights_only``).
        hint: what to do when there is no such file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
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
    return state.get("model", state) if isinstance(state, Mapping) else {}


def tensors_of(contents: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict of a checkpoint, which may lie below one of the usual keys."""
    for key in BELOW:
        inside = contents.get(key)
        if isinstance(inside, Mapping) and any(isinstance(value, Tensor) for value in inside.values()):
            return {name: value for name, value in inside.items() if isinstance(value, Tensor)}
    return {name: value for name, value in contents.items() if isinstance(value, Tensor)}


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what distributed training, compiling and training frameworks put before every name.

    Raises:
        ValueError: two tensors would have one name.
    """
    names = list(state)
    while True:
        wrapper = next((w for w in WRAPPERS if names and all(name.startswith(w) for name in names)), None)
        if wrapper is None:
            break
        names = [name.removeprefix(wrapper) for name in names]
    if len(set(names)) < len(names):
        raise ValueError("two tensors of the checkpoint have one name without their wrappers' names")
    return dict(zip(names, state.values(), strict=True))


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
