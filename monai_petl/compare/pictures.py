"""What is kept of some scored cases so that methods can be looked at side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from monai_petl.files.atomic import written_whole

__all__ = ["PictureTaker"]


class PictureTaker:
    """Keeps one slice of some cases of an evaluator, spread over all of them: image, reference and prediction.

    Images have rows and columns, in this order. Of a volume it is the slice along depth with the most foreground in the
    reference. Labels and predictions may be one-hot maps (K, *spatial), maps of class numbers (1, *spatial), or, for
    classification, a number or K scores.

    Args:
        evaluator: a MONAI evaluator whose output has ``image``, ``label`` and ``pred``.
        names: of all its cases, in its order.
        count: how many cases are kept.
    """

    def __init__(self, evaluator: Engine, names: Sequence[str], count: int) -> None:
        count = min(count, len(names))
        self.names = names
        self.chosen = sorted(
            {(2 * i + 1) * len(names) // (2 * count) for i in range(count)}
        )  # the middles of equal parts
        self.taken: list[dict[str, np.ndarray]] = []
        self._seen = 0
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._take)

    def _take(self, engine: Engine) -> None:
        output = engine.state.output
        for item in output if isinstance(output, list) else []:
            if self._seen in self.chosen:
                self.taken.append(_picture(item))
            self._seen += 1

    def save(self, path: str | Path) -> None:
        """Write an .npz file of ``image_0``, ``label_0``, ``pred_0``, ``image_1``, ... and ``names``, of the cases in order."""
        arrays: dict[str, Any] = {f"{n}_{i}": value for i, one in enumerate(self.taken) for n, value in one.items()}
        with written_whole(path, "the pictures") as part:
            np.savez_compressed(part, names=np.array([self.names[i] for i in self.chosen[: len(self.taken)]]), **arrays)


def _picture(item: dict[str, Any]) -> dict[str, np.ndarray]:
    image, label, pred = (torch.as_tensor(item[name]).detach().cpu() for name in ("image", "label", "pred"))
    image = image if image.shape[0] == 3 else image[:1]
    volume = image.ndim == 4
    if label.ndim < image.ndim:  # a class for the whole image
        image = _upright(image[..., image.shape[-1] // 2]) if volume else image
        return {"image": _bytes(image), "label": _flat(label), "pred": _flat(pred)}
    label, pred = _classes(label), _classes(pred)
    if volume:
        z = int((label > 0).sum((0, 1)).argmax())
        image, label, pred = (_upright(x[..., z]) for x in (image, label, pred))
    maps = {name: x.numpy().astype(np.uint8) for name, x in (("label", label), ("pred", pred))}
    return {"image": _bytes(image), **maps}


def _classes(x: Tensor) -> Tensor:
    """(K, *spatial) one-hot or (1, *spatial) -> class numbers (*spatial)."""
    return x.argmax(0) if x.shape[0] > 1 else x[0]


def _upright(x: Tensor) -> Tensor:
    """(..., X, Y) of a volume -> rows and columns as radiologists look at them, the patient's right on the left."""
    return x.flip(-2, -1).mT


def _bytes(image: Tensor) -> np.ndarray:
    """(C, H, W) of any range -> (H, W, C) of 0 to 255, between its 0.5th and 99.5th percentile."""
    values = image.float()
    low, high = np.percentile(values.numpy(), [0.5, 99.5])
    scaled = (values - low) / max(float(high - low), 1e-6)
    return (255 * scaled.clamp(0, 1)).round().to(torch.uint8).movedim(0, -1).numpy()


def _flat(x: Tensor) -> np.ndarray:
    return np.atleast_1d(x.float().squeeze().numpy())
