"""Files of ``torch.save``: written whole or not at all, and looked at before they are read."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_petl.files.atomic import written_whole

__all__ = ["TorchFileError", "read_torch", "require_whole", "write_state"]

INFLATION = 20  # times that what is in a file may be larger than the file; torch compresses nothing


class TorchFileError(ValueError):
    """The file was changed or is inflated."""


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


def read_torch(path: str | os.PathLike, map_location: str | torch.device = "cpu") -> Any:
    """``torch.load`` of tensors alone, without running code.

    torch does not compare the checksums of its files; this does, and takes no more memory than the file has a right to.

    Raises:
        TorchFileError: the file was changed, or is inflated.
        pickle.UnpicklingError: it holds more than tensors, or is no file of torch.save.
        RuntimeError, EOFError, OSError, ValueError: torch cannot read it.
    """
    require_whole(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
        raise
    except Exception as error:  # for bytes that are no file of its own torch's reader raises errors of many kinds
        raise pickle.UnpicklingError(f"no file of torch.save: {error}") from error
    _refuse_more(Path(path), sum(tensor.nbytes for tensor in _tensors(state)), "its tensors repeat values")
    return state


def require_whole(path: str | os.PathLike) -> None:
    """Compare the checksums of a file of ``torch.save``; files in its form from before 2020 have none and pass.

    Raises:
        TorchFileError: the file was changed, or is inflated.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
            _refuse_more(path, size, "it is compressed, which torch.save does not do")
            changed = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, UnicodeDecodeError, NotImplementedError, RuntimeError, EOFError) as error:
        raise TorchFileError(f"{path} is damaged ({error}). Copy or download it again") from None
    if changed is not None:
        raise TorchFileError(f"{path} is damaged: {changed} does not fit its checksum. Copy or download it again")


def _refuse_more(path: Path, size: int, why: str) -> None:
    there = path.stat().st_size
    if size > INFLATION * there:
        raise TorchFileError(
            f"{path} has {there / 2**20:,.1f} MiB and would take {size / 2**20:,.0f} MiB of memory: {why}. Save it "
            "again with torch.save, without views"
        )


def _tensors(state: Any) -> Iterator[Tensor]:
    """Tensors of a state, however deep."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)
