"""Safetensors files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from monai_petl.atomic import written_whole

__all__ = ["write_tensors"]


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
    plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    with written_whole(path, what) as part:
        part.touch()  # with the user's usual permissions
        mode = part.stat().st_mode
        try:
            save_file(plain, part, dict(header))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        part.chmod(mode)
    return path
