"""A stopped training goes on from its checkpoint, with the trainer's own epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import MeanSquaredError
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointSaver, from_engine
from torch import nn

from monai_petl.handlers import BestMetric, ResumableTraining


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


def validation(folder: Path, value: float, options: dict) -> tuple[SupervisedEvaluator, BestMetric]:
    """An evaluator whose key metric is the square of ``value``, and which keeps the network of the best."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, value)
    saver = CheckpointSaver(str(folder), {"model": network}, save_key_metric=True, **options)
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=[{"image": torch.ones(1, 1), "label": torch.zeros(1, 1)}],
        network=network,
        key_val_metric={"error": MeanSquaredError(output_transform=from_engine(["pred", "label"]))},
        val_handlers=[saver],
        decollate=False,
    )
    return evaluator, BestMetric(evaluator, [saver], [])


@pytest.mark.parametrize(
    "options", [{"key_metric_filename": "model.pt"}, {}], ids=["fixed name", "name with the metric"]
)
@pytest.mark.parametrize(("later", "kept"), [(1.0, 4.0), (2.0, 4.0), (3.0, 9.0)], ids=["worse", "equal", "better"])
def test_only_what_is_better_than_before_the_pause_is_saved(tmp_path, options, later, kept):
    first, best = validation(tmp_path, 2.0, options)
    first.run(1)
    state = best.state_dict()
    second, best = validation(tmp_path, later, options)
    best.load_state_dict(state)
    second.run(2)
    assert second.state.best_metric == kept
    (file,) = tmp_path.iterdir()
    assert torch.load(file)["weight"].item() ** 2 == kept


def test_without_its_file_the_best_of_before_is_forgotten(tmp_path):
    first, best = validation(tmp_path, 2.0, {"key_metric_filename": "model.pt"})
    first.run(1)
    state = best.state_dict()
    (tmp_path / "model.pt").unlink()
    second, best = validation(tmp_path, 1.0, {"key_metric_filename": "model.pt"})
    best.files = [tmp_path / "model.pt"]
    best.load_state_dict(state)
    second.run(2)
    assert second.state.best_metric == 1.0
    assert (tmp_path / "model.pt").is_file()
