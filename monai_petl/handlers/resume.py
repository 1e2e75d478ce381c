"""Checkpoints from which a training run goes on where it stopped."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import monai.handlers
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.handlers import CheckpointLoader

from monai_petl.files.torch_files import TorchFileError, require_whole
from monai_petl.handlers.checkpoint_saver import CheckpointSaver

__all__ = ["BestMetric", "ResumableTraining", "require_checkpoint"]


class ResumableTraining:
    """MONAI's checkpoint saver and loader for a trainer and everything that belongs to its state.

    The trainer itself (epoch and iteration) is part of the checkpoint; a config cannot say that, since a trainer's handlers
    are built before it.

    Args:
        save_dir: folder of the checkpoint.
        objects: name -> network, optimizer, scheduler, teacher, ...: what has a state; ``None`` for what is not used.
        interval: epochs between two checkpoints; the last one is kept.
        file_prefix: beginning of the file's name.
        resume_path: a checkpoint to go on from; ``None`` to start anew.
        map_location: device to load to.

    Raises:
        FileNotFoundError: there is no file at ``resume_path``.
        ValueError: the checkpoint is damaged; (when training starts) it is of another training, or its learning rate schedule
            is of another length.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike,
        objects: Mapping[str, Any],
        interval: int = 1,
        file_prefix: str = "",
        resume_path: str | os.PathLike | None = None,
        map_location: str | torch.device | None = None,
    ) -> None:
        require_checkpoint(resume_path)
        self.save_dir, self.interval = str(save_dir), interval
        self.objects = {name: thing for name, thing in objects.items() if thing is not None}
        self.file_prefix, self.resume_path, self.map_location = file_prefix, resume_path, map_location

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        state = {**self.objects, "trainer": engine}
        if self.resume_path is not None:
            location = None if self.map_location is None else torch.device(self.map_location)
            _Loader(str(self.resume_path), state, map_location=location).attach(engine)
            engine.add_event_handler(Events.STARTED, self._check_schedules, self._planned_steps())
        if idist.get_rank() == 0:  # all processes load, one writes
            CheckpointSaver(
                self.save_dir, state, file_prefix=self.file_prefix, save_interval=self.interval, n_saved=1
            ).attach(engine)

    def _planned_steps(self) -> dict[str, int]:
        """Length of each schedule that has one, such as one cycle."""
        return {name: thing.total_steps for name, thing in self.objects.items() if hasattr(thing, "total_steps")}

    def _check_schedules(self, planned: dict[str, int]) -> None:
        for name, steps in self._planned_steps().items():
            if steps != planned[name]:
                raise ValueError(
                    f"{self.resume_path} is of a training of {steps} steps, this one is of {planned[name]}: a learning rate "
                    "schedule cannot change its length midway. Give the same epochs and epoch_length"
                )


def require_checkpoint(resume_path: str | os.PathLike | None) -> None:
    """Refuse a path without a whole checkpoint before anything is built or written.

    Raises:
        FileNotFoundError: a path is given and there is no file.
        ValueError: the file was cut off or changed, or is none of torch's; names whole ones beside it.
    """
    if resume_path is None:
        return
    path = Path(resume_path)
    if not path.is_file():
        raise FileNotFoundError(f"resume_path names no checkpoint: {resume_path}")
    if reason := _damage(path):
        others = sorted(str(other) for other in path.parent.glob("*.pt") if other != path and not _damage(other))
        remedy = f"Resume from {' or '.join(others)}" if others else "Start anew, without resume_path"
        raise ValueError(f"resume_path {resume_path} is damaged: {reason}. {remedy}")


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint's file."""
    if not zipfile.is_zipfile(path):  # whose table of contents is at the end
        return f"{path.stat().st_size:,} bytes without an end, as after a stop while it was written"
    try:
        require_whole(path)
    except TorchFileError:
        return "it was changed after it was written"
    return ""


class _Loader(CheckpointLoader):
    """MONAI's loader, which names the file when it does not fit."""

    def __call__(self, engine: Engine) -> None:
        try:
            held = torch.load(self.load_path, map_location="cpu", mmap=True, weights_only=True)
            missing = [name for name in self.load_dict if not isinstance(held, Mapping) or name not in held]
            if missing:
                raise ValueError(
                    f"{self.load_path} is no checkpoint of this training: it has no {', '.join(missing)}. Checkpoints lie in "
                    "checkpoints in the bundle's output_dir; models/model.pt is the network alone"
                )
            super().__call__(engine)
        except pickle.UnpicklingError:  # torch's own advice is to execute what the file holds
            raise ValueError(
                f"{self.load_path} is no checkpoint of a training: it holds Python objects, which could run code. Start anew, "
                "without resume_path"
            ) from None
        except (RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"{self.load_path} does not fit this training: {reason}. Give the method and settings of its first run"
            ) from error


class BestMetric:
    """The best key metric so far as a part of a checkpoint, so that a resumed training keeps what was better before.

    An evaluator counts from nothing in every run: the first validation after a pause would be the best one and overwrite
    the file of a better network.

    Args:
        evaluator: the evaluator of the validation.
        handlers: its handlers, among them MONAI's saver of the best network.
        files: what they write. Where one is not there any more, nothing is worth keeping and the count starts anew.

    Example::

        best = BestMetric(evaluator, evaluator_handlers, ["models/model.pt"])
        ResumableTraining("checkpoints", {"model": network, "best": best})
    """

    def __init__(self, evaluator: Evaluator, handlers: Sequence[Any], files: Sequence[str | os.PathLike]) -> None:
        self.evaluator, self.files = evaluator, list(files)
        self.savers = [
            h for h in handlers if isinstance(h, monai.handlers.CheckpointSaver) and h._key_metric_checkpoint
        ]

    def state_dict(self) -> dict[str, Any]:
        """Value and epoch of the best validation (-1 when there was none), and what MONAI's savers know of theirs."""
        state = self.evaluator.state
        saved = [saver._key_metric_checkpoint.state_dict() for saver in self.savers]
        return {"metric": float(state.best_metric), "epoch": int(state.best_metric_epoch), "saved": saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make it the one that the next validation must exceed."""
        if state["epoch"] < 0 or not all(Path(file).is_file() for file in self.files):
            return
        self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = state["metric"], state["epoch"]
        for saver, saved in zip(self.savers, state["saved"], strict=True):
            saver.load_state_dict(saved)
