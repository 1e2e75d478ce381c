"""Safetensors files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from monai_petl.atomic import written_whole

__all__ = ["save_tensors", "write_tensors"]


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], header: Mapping[str, str], what: str) -> Path:
    """Write a safetensors file beside its place and move it there.

    Args:
        path: where to write; missing folders are made.
        tensors: from any device; none may share memory with another one.
        header: texts to keep with them.
        what: what is written, for the error.

    Raises:
        OSError: the place cannot be written to.
    """
    path = Path(path)
    with written_whole(path, what, sum(tensor.nbytes for tensor in tensors.values())) as part:
        save_tensors(part, tensors, header)
    return path


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """As safetensors' ``save_file``, with the user's usual permissions and its errors as ``OSError``."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, dict(header))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)
