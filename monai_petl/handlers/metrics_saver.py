"""MONAI's tables of metrics, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import monai.handlers
from ignite.engine import Engine

__all__ = ["MetricsSaver"]


class MetricsSaver(monai.handlers.MetricsSaver):
    """As ``monai.handlers.MetricsSaver``; tables of an earlier run stay until the new ones are written.

    Raises:
        OSError: (when called) the folder cannot be written to, or the disk is full.
    """

    def __call__(self, engine: Engine) -> None:
        target = Path(self.save_dir)  # type: ignore[has-type]
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".metrics.", suffix=".partial", dir=target) as folder:
            self.save_dir = folder
            try:
                super().__call__(engine)
            finally:
                self.save_dir = str(target)
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, target / file.name)
