"""Networks as MONAI and this package save them: flat state dicts, never code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monai_petl.atomic import written_whole

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
    with written_whole(path, "the network") as part:
        torch.save({name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}, part)
    return path
