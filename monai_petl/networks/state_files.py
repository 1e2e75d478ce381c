"""Networks as MONAI and this package save them: flat state dicts, never code."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["read_state_dict", "save_network"]


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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a state dict, it may be damaged or truncated: {error}") from error
    return state.get("model", state) if isinstance(state, Mapping) else {}


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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        torch.save({name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}, part)
        os.replace(part, path)
    return path
