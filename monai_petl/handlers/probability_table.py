"""What a classifier says of every image, as a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ignite.engine import Engine, Events

from monai_petl.files.atomic import written_whole

__all__ = ["ProbabilityTable"]


class ProbabilityTable:
    """Writes a CSV table at the end of a run: file, prediction, and the probability of every class.

    Args:
        path: of the table; its folder is made. It appears whole or not at all.
        class_names: K names, in the order of the probabilities (K,) that the evaluator's output has as ``pred``.
        multi_label: whether the prediction is all classes of a probability above 0.5, joined by ``|``; else the most probable.
    """

    def __init__(self, path: str, class_names: Sequence[str], multi_label: bool = False) -> None:
        self.path = Path(path)
        self.class_names, self.multi_label = list(class_names), multi_label
        self.rows: list[list[str]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        for item in engine.state.output:
            probabilities = item["pred"].float()
            chosen = (probabilities > 0.5).nonzero()[:, 0] if self.multi_label else probabilities.argmax()[None]
            said = "|".join(self.class_names[place] for place in chosen.tolist())
            self.rows.append(
                [item["image"].meta["filename_or_obj"], said, *(f"{p:.6f}" for p in probabilities.tolist())]
            )

    def _write(self, engine: Engine) -> None:
        with written_whole(self.path, "the table") as part, part.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["file", "prediction", *self.class_names], *self.rows])
