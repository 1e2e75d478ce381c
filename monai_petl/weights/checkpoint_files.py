"""The tensors of a checkpoint, wherever its training put them in the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from monai_petl.weights.state_files import read_contents

__all__ = ["Checkpoint", "read_tensors"]

WRAPPERS = (
    *("state_dict", "model", "net", "model_state_dict", "network_weights", "trunk_state_dict", "network"),
    *("student", "teacher"),  # where they are whole networks, and not projection heads beside one
)


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors by name, and those beside them -> why they are not read."""

    path: Path
    tensors: Mapping[str, Tensor]
    beside: dict[str, str] = field(default_factory=dict)


def read_tensors(path: str | os.PathLike, hint: str = "Give the file's place") -> Checkpoint:
    """Read a checkpoint; no code in it is executed.

    Args:
        path: a safetensors file, or one of ``torch.save``. Of a file that holds several tables of tensors, the first of
            ``state_dict``, ``model``, ``net``, ..., ``student`` is read, and the others are accounted for.
        hint: what to do when there is no such file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}. {hint}")
    if path.suffix == ".safetensors":
        try:
            return Checkpoint(path, load_file(path))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is no safetensors file, or it is truncated: {error}. Copy or download it again"
            ) from error
    contents = read_contents(path, hint)
    table = next((key for key in WRAPPERS if _has_tensors(contents.get(key))), None)
    tensors = contents if table is None else contents[table]
    if not _has_tensors(tensors):
        raise ValueError(f"{path} holds no tensors by name; it holds {', '.join(map(str, contents)) or 'nothing'}")
    beside = {
        f"{key}.{name}": f"beside the network, under {key!r}"
        for key, value in contents.items()
        if table is not None and key != table and isinstance(value, Mapping)
        for name, tensor in value.items()
        if isinstance(tensor, Tensor)
    }
    return Checkpoint(path, {str(n): t for n, t in tensors.items() if isinstance(t, Tensor)}, beside)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values())
