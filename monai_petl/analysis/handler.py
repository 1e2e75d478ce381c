"""Separation of features during an evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from monai_petl.analysis.separation import nearest_centroid_accuracy, separation
from monai_petl.analysis.tokens import expected_calibration_error
from monai_petl.files.atomic import write_text
from monai_petl.files.tensor_files import write_tensors

__all__ = ["FeatureSeparation"]


def _probabilities_and_labels(output: Any) -> tuple[list[Tensor], list[Any]]:
    return [item["pred"] for item in output], [item["label"] for item in output]


class FeatureSeparation:
    """Collects what the head of a classifier reads, and at the end says how far the classes lie apart.

    Attach it to an evaluator with one label an image: ``engine.state.metrics`` gets ``separation_fisher`` and the others of
    :class:`monai_petl.analysis.Separation`, ``separation_centroid`` (accuracy of the nearest class mean of all other images)
    and ``calibration_error``.

    Args:
        layer: the head, whose input is collected.
        path: a ``.json`` file for the numbers, and beside it features and labels as ``.safetensors``; without it
            nothing is written.
        output_transform: the evaluator's output -> probabilities (K,) and labels, lists of them.

    Raises:
        ValueError: the path is no ``.json`` file; an image has several labels.
    """

    def __init__(
        self,
        layer: nn.Module,
        path: str | None = None,
        output_transform: Callable[[Any], Any] = _probabilities_and_labels,
    ) -> None:
        if path and not path.endswith(".json"):
            raise ValueError(f"path must be a .json file, got {path!r}")
        self.layer, self.path, self.output_transform = layer, path, output_transform
        self.features: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        self.labels: list[Tensor] = []
        self._hook: Any = None

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Engine) -> None:
        for kept in (self.features, self.probabilities, self.labels):
            kept.clear()
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.layer.register_forward_pre_hook(
            lambda _, inputs: self.features.append(
                convert_to_tensor(inputs[0].detach(), dtype=torch.float32, device="cpu", track_meta=False)
            )
        )

    def _collect(self, engine: Engine) -> None:
        probabilities, labels = self.output_transform(engine.state.output)
        self.probabilities.append(torch.stack([torch.as_tensor(p).float().cpu() for p in probabilities]))
        numbers = torch.as_tensor([torch.as_tensor(label).tolist() for label in labels])
        if numbers.ndim != 1:
            raise ValueError(f"FeatureSeparation is for one label an image, got rows of {numbers.shape[1]}")
        self.labels.append(numbers)

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._hook.remove()
        raise error

    def _finish(self, engine: Engine) -> None:
        self._hook.remove()
        features, labels = torch.cat(self.features), torch.cat(self.labels)
        found = {f"separation_{name}": value for name, value in separation(features, labels).to_dict().items()}
        found["separation_centroid"] = _leave_one_out(features, labels)
        found["calibration_error"] = expected_calibration_error(torch.cat(self.probabilities), labels)
        engine.state.metrics.update(found)
        if self.path:
            target = Path(self.path)
            finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
            write_tensors(
                target.with_suffix(".safetensors"), {"features": features, "labels": labels}, {}, "the features"
            )
            write_text(target, json.dumps(finite, indent=4) + "\n", "the scores")


def _leave_one_out(features: Tensor, labels: Tensor) -> float:
    everything = torch.arange(len(labels))
    right = [
        nearest_centroid_accuracy(
            features[everything != i], labels[everything != i], features[i : i + 1], labels[i : i + 1]
        )
        for i in range(len(labels))
    ]
    return sum(right) / len(right)
