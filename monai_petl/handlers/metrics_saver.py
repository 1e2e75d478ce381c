"""MONAI's tables of metrics, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import monai.handlers
from ignite.engine import Engine

from monai_petl.files.atomic import all_written_whole

__all__ = ["MetricsSaver"]


class MetricsSaver(monai.handlers.MetricsSaver):
    """As ``monai.handlers.MetricsSaver``; tables of an earlier run stay until the new ones are written.

    Raises:
        OSError: (when called) the folder cannot be written to, or the disk is full.
    """

    def __call__(self, engine: Engine) -> None:
        target = Path(self.save_dir)  # type: ignore[has-type]
        with all_written_whole(target, "the metrics") as folder:
            self.save_dir = str(folder)
            try:
                super().__call__(engine)
            finally:
                self.save_dir = str(target)
