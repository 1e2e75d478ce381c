"""Gradient clipping for MONAI trainers, between the backward pass and the optimiser step."""

from __future__ import annotations

import torch
from ignite.engine import Engine
from monai.engines import Trainer
from monai.engines.utils import IterationEvents
from torch import nn

__all__ = ["GradientClipping", "GradientNormClipping"]


class GradientClipping:
    """Clips every gradient value to [-clip_value, clip_value], in true units also under mixed precision.

    With gradient accumulation only the accumulated gradient is clipped, just before the optimiser's step.

    Args:
        clip_value: largest absolute value that a gradient keeps.

    Raises:
        ValueError: `clip_value` is not positive.

    Example::

        SupervisedTrainer(..., train_handlers=[GradientClipping(1.0)])
    """

    def __init__(self, clip_value: float = 1.0) -> None:
        if clip_value <= 0:
            raise ValueError(f"clip_value must be positive, got {clip_value}")
        self.clip_value = clip_value

    def attach(self, engine: Engine) -> None:
        """
        Raises:
            TypeError: the engine is not a MONAI trainer.
        """
        if not isinstance(engine, Trainer):
            raise TypeError(f"GradientClipping needs a MONAI trainer, such as SupervisedTrainer, got {type(engine)}")
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Trainer) -> None:
        if not _steps_now(engine):
            return
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        self.clip([parameter for group in engine.optimizer.param_groups for parameter in group["params"]])

    def clip(self, parameters: list[nn.Parameter]) -> None:
        """Clip the gradients of these parameters in place."""
        torch.nn.utils.clip_grad_value_(parameters, self.clip_value)


class GradientNormClipping(GradientClipping):
    """Shortens the gradient of all parameters together to a norm of ``max_norm``; else as :class:`GradientClipping`.

    Args:
        max_norm: largest Euclidean norm.

    Raises:
        ValueError: ``max_norm`` is not positive.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        if max_norm <= 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        self.max_norm = max_norm

    def clip(self, parameters: list[nn.Parameter]) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)


def _steps_now(engine: Trainer) -> bool:
    """Whether the optimiser steps in this iteration; with accumulated gradients it does not in each."""
    steps = getattr(engine, "accumulation_steps", 1)
    length = engine.state.epoch_length
    iteration = engine.state.iteration if length is None else (engine.state.iteration - 1) % length + 1
    return iteration % steps == 0 or iteration == length
