"""Safetensors files that appear whole or not at all, and what is left out of files of training scripts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from monai_petl.files.atomic import written_whole

__all__ = ["log_left_out", "save_tensors", "write_tensors"]

logger = logging.getLogger(__name__)


def log_left_out(path: str | os.PathLike, contents: Mapping[str, Any], read: str) -> None:
    """Say what a file holds beside the tensors that are read, such as a teacher's or a state of an optimizer.

    Args:
        path: the file.
        contents: all of it.
        read: the key whose tensors are read.
    """
    beside = {key: _tensors_in(value) for key, value in contents.items() if key != read}
    left_out = [f"{key} ({count} tensors)" for key, count in beside.items() if count]
    if left_out:
        logger.info("%s: reads %r; left out: %s", path, read, ", ".join(left_out))


def _tensors_in(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_tensors_in, value.values()))
    return int(isinstance(value, Tensor))


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
