"""The former network and checkpoint are there until the new ones are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import MeanSquaredError
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import from_engine
from torch import nn

from monai_petl.handlers import CheckpointSaver, FiniteLoss, MetricsSaver, ResumableTraining, require_checkpoint

BATCH = {"image": torch.tensor([[1.0, 2.0]]), "label": torch.tensor([[3.0]])}


def trainer(network: nn.Module, *handlers: object, epochs: int = 3, lr: float = 0.1) -> SupervisedTrainer:
    return SupervisedTrainer(
        device="cpu", max_epochs=epochs, train_data_loader=[BATCH] * 2, network=network, decollate=False,
        optimizer=torch.optim.SGD(network.parameters(), lr), loss_function=nn.MSELoss(), train_handlers=list(handlers),
    )  # fmt: skip


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str, times: int = 1) -> None:
    """Writing a file of this name ends in the middle."""
    real, left = torch.save, [times]

    def save(state, path, *args, **kwargs):
        if name in str(path):
            left[0] -= 1
            if left[0] < 0:
                Path(path).write_bytes(b"half a file")
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nmore")
        real(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)


def test_the_best_network_is_kept_when_the_next_one_cannot_be_written(tmp_path, monkeypatch):
    network = nn.Linear(2, 1)
    evaluator = SupervisedEvaluator(
        device="cpu", val_data_loader=[BATCH], network=network, decollate=False,
        key_val_metric={"error": MeanSquaredError(from_engine(["pred", "label"]))},
        val_handlers=[CheckpointSaver(str(tmp_path), {"model": network}, save_key_metric=True, key_metric_filename="model.pt")],
    )  # fmt: skip
    evaluator.run()
    before = torch.load(tmp_path / "model.pt", weights_only=True)
    full_disk(monkeypatch, "model.pt", times=0)
    with torch.no_grad():
        network.weight += 5
    with pytest.raises(
        OSError, match=r"cannot write the network to .*model\.pt.*the disk is full.*The former file is kept"
    ):
        evaluator.run()
    after = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_checkpoint_goes_only_when_its_successor_is_there(tmp_path, monkeypatch):
    network = nn.Linear(2, 1)
    full_disk(monkeypatch, "epoch=2", times=0)
    with pytest.raises(OSError, match="cannot write the checkpoint"):
        trainer(network, ResumableTraining(tmp_path, {"model": network}, interval=1)).run()
    (left,) = tmp_path.iterdir()
    assert "epoch=1" in left.name
    require_checkpoint(left)
    monkeypatch.undo()
    resumed = trainer(network, ResumableTraining(tmp_path, {"model": network}, interval=1, resume_path=left))
    resumed.run()
    assert "epoch=3" in sorted(path.name for path in tmp_path.iterdir())[-1]


def test_one_checkpoint_is_kept(tmp_path):
    network = nn.Linear(2, 1)
    trainer(network, ResumableTraining(tmp_path, {"model": network}, interval=1), epochs=4).run()
    (left,) = tmp_path.iterdir()
    assert "epoch=4" in left.name


def test_a_checkpoint_that_was_cut_off_is_refused_with_a_whole_one(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pt")
    cut = tmp_path / "cut.pt"
    cut.write_bytes((tmp_path / "whole.pt").read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"cut\.pt is damaged: 1,500 bytes without an end.*Resume from .*whole\.pt"):
        require_checkpoint(cut)
    (tmp_path / "whole.pt").unlink()
    with pytest.raises(ValueError, match="Start anew"):
        require_checkpoint(cut)


OTHER: dict[str, tuple[Any, str]] = {
    "the network alone": (
        nn.Linear(2, 1).state_dict(),
        "it has no model, trainer.*models/model.pt is the network alone",
    ),
    "a list": ([1, 2], "it has no model, trainer"),
    "no trainer": ({"model": nn.Linear(2, 1).state_dict()}, "it has no trainer"),
    "another network": (
        {"model": nn.Linear(3, 1).state_dict(), "trainer": {"epoch_length": 2, "max_epochs": 3, "iteration": 2}},
        "does not fit this training: .*size mismatch for weight.* Give the method and settings of its first run",
    ),
    "objects": ({"model": Path("x")}, "holds Python objects, which could run code. Start anew"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_a_file_that_is_no_checkpoint_of_this_training_is_named(tmp_path, kind):
    state, message = OTHER[kind]
    file = tmp_path / "x.pt"
    torch.save(state, file)
    network = nn.Linear(2, 1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=f"{file} .*{message}") as error:
        trainer(network, ResumableTraining(tmp_path / "out", {"model": network}, resume_path=file)).run()
    assert "weights_only" not in str(error.value)
    if kind != "another network":
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_is_not_finite_is_not_saved(tmp_path, value):
    network = nn.Linear(2, 1)
    saver = CheckpointSaver(str(tmp_path), {"model": network}, save_final=True, final_filename="model.pt")
    engine = Engine(lambda engine, batch: None)
    saver.attach(engine)
    engine.run([0])
    before = (tmp_path / "model.pt").read_bytes()
    with torch.no_grad():
        network.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"not saved: weight holds NaN or infinity.*model\.pt is kept as it was"):
        engine.run([0])
    assert (tmp_path / "model.pt").read_bytes() == before


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("lr", [1e30, float("nan")])
def test_a_training_that_diverges_ends_with_an_error(lr):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) in epoch \d, step \d: the training has diverged"):
        trainer(nn.Linear(2, 1), FiniteLoss(), lr=lr).run()


def test_tables_of_metrics_are_those_of_monai_and_leave_nothing_behind(tmp_path):
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(dice=0.5))
    MetricsSaver(str(tmp_path), metrics=["dice"]).attach(engine)
    engine.run([0])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert (tmp_path / "metrics.csv").read_text(encoding="utf-8").split() == ["dice,0.5"]
