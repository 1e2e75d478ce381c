"""MONAI's saver of networks and checkpoints, so that the former file is there until the new one is whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monai.handlers
import torch
from ignite.handlers.checkpoint import BaseSaveHandler, Checkpoint
from torch import Tensor

from monai_petl.files.torch_files import write_state

__all__ = ["CheckpointSaver", "save_whole"]


class CheckpointSaver(monai.handlers.CheckpointSaver):
    """As ``monai.handlers.CheckpointSaver``, with files that appear whole or not at all.

    MONAI removes the former file and then writes the new one in its place. A full disk or a kill in between loses both.

    Args:
        args, kwargs: those of MONAI's handler.

    Raises:
        OSError: (when called) a file cannot be written; says how much room is left, and that the former file is kept.
        ValueError: (when called) a tensor of the network holds NaN or infinity; the former file is kept.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for checkpoint in (self._final_checkpoint, self._key_metric_checkpoint, self._interval_checkpoint):
            if isinstance(checkpoint, Checkpoint):
                name = getattr(checkpoint.save_handler, "filename", None)
                checkpoint.save_handler = _WholeFiles(Path(self.save_dir), name)


class _WholeFiles(BaseSaveHandler):
    """Writes beside and moves; what ignite asks to remove goes when its successor is there."""

    def __init__(self, folder: Path, filename: str | None) -> None:
        self.folder, self.filename = folder, filename
        self.outdated: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to shows up now

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        name = self.filename or filename
        save_whole(checkpoint, self.folder / name, "the checkpoint" if self.filename is None else "the network")
        for old in [old for old in self.outdated if old != name]:
            (self.folder / old).unlink(missing_ok=True)
        self.outdated = []

    def remove(self, filename: str) -> None:
        self.outdated.append(self.filename or filename)


def save_whole(state: Any, path: Path, what: str) -> None:
    """``torch.save``, whole or not at all, and never with NaN or infinity.

    Raises:
        OSError, ValueError: as :class:`CheckpointSaver`.
    """
    wrong = _not_finite(state)
    if wrong:
        kept = f" {path} is kept as it was." if path.is_file() else ""
        raise ValueError(
            f"{what} was not saved: {wrong} holds NaN or infinity. The training has diverged, often for a learning rate that "
            f"is too high or an image with extreme values.{kept}"
        )
    write_state(path, state, what)


def _not_finite(state: Any, name: str = "") -> str:
    """The name of the first tensor that holds NaN or infinity, of a network's state within ``state``."""
    if isinstance(state, Tensor):
        return name if state.is_floating_point() and not bool(torch.isfinite(state).all()) else ""
    if isinstance(state, Mapping):
        return next(
            (found for key, value in state.items() if (found := _not_finite(value, f"{name}.{key}".strip(".")))), ""
        )
    return ""
