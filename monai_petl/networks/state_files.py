"""Reading networks that MONAI or this package saved: flat state dicts, never code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["read_state_dict"]


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
