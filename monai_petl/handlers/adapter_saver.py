"""Keep the adapter of the best validation, or of the end of training, as a small file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import Evaluator
from torch import nn

from monai_petl.core.adapters import save_adapter

__all__ = ["AdapterSaver"]


class AdapterSaver:
    """Ignite handler that writes an adapter file.

    Attached to a MONAI evaluator it writes whenever the key metric is better than before; attached to a trainer it writes
    once, when training ends.

    Args:
        network: the adapted network, not its distributed wrapper.
        path: the ``.safetensors`` file.
        name: the adapter's name; default the one attached last.
        notes: kept in the file's header; the key metric is added under its name.

    Example::

        SupervisedEvaluator(..., val_handlers=[AdapterSaver(network, "models/adapters/kidney.safetensors")])
    """

    def __init__(
        self,
        network: nn.Module,
        path: str | os.PathLike,
        name: str | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.path, self.name, self.notes = network, Path(path), name, dict(notes or {})

    def attach(self, engine: Engine) -> None:
        """Register with a trainer or an evaluator, and make the folder: a place that cannot be written shows up now.

        Raises:
            OSError: the folder cannot be made.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write the adapter to {self.path}: {error}") from error
        engine.add_event_handler(Events.COMPLETED, self.save_best if isinstance(engine, Evaluator) else self.save)

    def save(self, engine: Engine) -> None:
        """Write the adapter as it is now."""
        save_adapter(self.network, self.path, {**self.notes, "epoch": engine.state.epoch}, self.name)

    def save_best(self, engine: Engine) -> None:
        """Write the adapter when this validation is the best so far."""
        if engine.state.best_metric_epoch == engine.state.epoch:
            metric = {engine.state.key_metric_name: round(float(engine.state.best_metric), 5)}
            notes = {**self.notes, "epoch": engine.state.epoch, **metric}
            save_adapter(self.network, self.path, notes, self.name)
