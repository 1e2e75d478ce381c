"""A stopped training goes on from its checkpoint, with the trainer's own epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import nn

from monai_petl.handlers import ResumableTraining


def trainer(folder: Path, epochs: int, resume_path: Path | None = None) -> tuple[SupervisedTrainer, nn.Module]:
    torch.manual_seed(1 if resume_path else 0)
    network = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3 * epochs)
    batch = {"image": torch.tensor([[1.0, 2.0]]), "label": torch.tensor([[3.0]])}
    objects = {"model": network, "optimizer": optimizer, "lr_scheduler": schedule, "unused": None}
    handler = ResumableTraining(folder, objects, interval=1, resume_path=resume_path, map_location="cpu")
    engine = SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=[batch] * 3,
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        decollate=False,
        train_handlers=[handler],
    )
    return engine, network


def test_training_goes_on_at_the_epoch_and_with_the_weights_of_the_checkpoint(tmp_path):
    straight, expected = trainer(tmp_path / "straight", epochs=3)
    straight.run()
    stopped, _ = trainer(tmp_path / "stopped", epochs=3)
    stopped.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: engine.terminate() if engine.state.epoch == 2 else None
    )
    stopped.run()
    (checkpoint,) = (tmp_path / "stopped").glob("*.pt")
    resumed, network = trainer(tmp_path / "resumed", epochs=3, resume_path=checkpoint)
    resumed.run()
    assert resumed.state.epoch == 3
    assert resumed.state.iteration == 9
    assert torch.equal(network.weight, expected.weight)


def test_a_schedule_of_another_length_is_refused(tmp_path):
    first, _ = trainer(tmp_path / "first", epochs=2)
    first.run()
    (checkpoint,) = (tmp_path / "first").glob("*.pt")
    longer, _ = trainer(tmp_path / "longer", epochs=4, resume_path=checkpoint)
    with pytest.raises(ValueError, match=r"6 steps, this one is of 12"):
        longer.run()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume_path names no checkpoint: .*nothing\.pt"):
        ResumableTraining(tmp_path, {}, resume_path=tmp_path / "nothing.pt")
