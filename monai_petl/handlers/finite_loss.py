"""Stop a training that has diverged, with a reason and an exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.handlers import from_engine
from monai.utils import ensure_tuple

__all__ = ["FiniteLoss"]


class FiniteLoss:
    """Raise ``ValueError`` when the loss of a step is NaN or infinite.

    ignite's ``TerminateOnNan`` ends the run as if all were well; this ends it with an error, which scripts and clusters see.

    Args:
        output_transform: gets the loss from the trainer's output; default its ``loss``.

    Raises:
        ValueError: (in training) with the epoch and the step, and what to change.
    """

    def __init__(self, output_transform: Callable[[Any], Any] | None = None) -> None:
        self.output_transform = output_transform or from_engine(["loss"], first=True)

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, before the handlers that save."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._check)

    def _check(self, engine: Engine) -> None:
        losses = ensure_tuple(self.output_transform(engine.state.output))  # MONAI gives one as a tuple, or as itself
        loss = torch.stack([torch.as_tensor(one).detach().float().mean() for one in losses])
        if not bool(torch.isfinite(loss).all()):
            raise ValueError(
                f"the loss is {float(loss.mean()):g} in epoch {engine.state.epoch}, step {engine.state.iteration}: the "
                "training has diverged. Lower the learning rate, or look for images with extreme values. What was saved "
                "before is kept"
            )
