"""GradientClipping with MONAI's own trainer."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn

from monai_petl.handlers import GradientClipping, GradientNormClipping


def run(handlers: list, **options) -> SupervisedTrainer:
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[{"image": torch.full((4, 1), 10.0), "label": torch.full((4, 1), 5.0)}] * 2,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=nn.MSELoss(),
        train_handlers=handlers,
        **options,
    )
    trainer.run()
    return trainer


def test_gradients_are_clipped_by_value_before_the_step():
    assert run([]).network.weight.grad.abs().max() > 1
    assert run([GradientClipping(1.0)]).network.weight.grad.abs().max() == 1
    assert run([GradientClipping(0.5)]).network.weight.grad.abs().max() == 0.5


def test_the_norm_of_all_gradients_is_clipped():
    def norm(trainer: SupervisedTrainer) -> torch.Tensor:
        return torch.stack([p.grad.norm() for p in trainer.network.parameters()]).norm()

    free = run([]).network
    clipped = run([GradientNormClipping(0.5)]).network
    assert norm(run([])) > 1
    torch.testing.assert_close(norm(run([GradientNormClipping(0.5)])), torch.tensor(0.5))
    ratio = free.weight.grad / free.bias.grad
    torch.testing.assert_close(clipped.weight.grad / clipped.bias.grad, ratio)
    with pytest.raises(ValueError, match="max_norm must be positive, got 0"):
        GradientNormClipping(0)


def test_only_the_accumulated_gradient_is_clipped():
    seen = []

    class Watch:
        def attach(self, engine: SupervisedTrainer) -> None:
            engine.add_event_handler(
                IterationEvents.BACKWARD_COMPLETED, lambda engine: seen.append(engine.network.weight.grad.abs().item())
            )

    run([GradientClipping(1.0), Watch()], accumulation_steps=2)
    assert seen[0] > 1
    assert seen[1] == 1


def test_mixed_precision_gradients_are_unscaled_first():
    calls = []

    class Scaler:
        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            calls.append(optimizer)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.div_(1024)

    trainer = run([])
    trainer.scaler = Scaler()
    trainer.network.weight.grad = torch.full((1, 1), 1024 * 0.25)
    trainer.network.bias.grad = torch.full((1,), 1024 * 3.0)
    GradientClipping(1.0)(trainer)
    assert calls == [trainer.optimizer]
    assert trainer.network.weight.grad.item() == 0.25
    assert trainer.network.bias.grad.item() == 1.0


def test_wrong_use_is_explained():
    with pytest.raises(ValueError, match="clip_value must be positive"):
        GradientClipping(0.0)
    with pytest.raises(TypeError, match="needs a MONAI trainer"):
        GradientClipping().attach(Engine(lambda engine, batch: None))
