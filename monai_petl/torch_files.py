"""Files of ``torch.save``: written whole or not at all, and looked at before they are read."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_petl.atomic import written_whole

__all__ = ["refuse_inflated", "write_state"]

INFLATION = 20  # times that what is in a file may be larger than the file; torch compresses nothing


def write_state(path: str | os.PathLike, state: Any, what: str) -> Path:
    """``torch.save``, whole or not at all.

    Args:
        path: where to write; missing folders are made.
        state: a state dict, or several by name.
        what: what is written, for the error.

    Raises:
        OSError: the place cannot be written to, or the disk is full; says what is needed and free.
    """
    path = Path(path)
    with written_whole(path, what, sum(tensor.nbytes for tensor in _tensors(state))) as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:
            raise OSError("torch could not write it whole; the disk is full, or files may not be this large") from error
    return path


def refuse_inflated(path: Path) -> None:
    """Refuse a file that would take far more memory than it has bytes.

    Raises:
        ValueError: its parts are compressed that strongly, which ``torch.save`` never does.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
    there = path.stat().st_size
    if size > INFLATION * there:
        raise ValueError(
            f"{path} has {there / 2**20:,.1f} MiB and would take {size / 2**20:,.0f} MiB of memory: it is compressed, which "
            "torch.save does not do. Get the file from its source, or save it again with torch.save"
        )


def _tensors(state: Any) -> Iterator[Tensor]:
    """Tensors of a state, however deep."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)
