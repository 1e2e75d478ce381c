from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator

from monai_petl import adapt, inspect_adapter, load_adapter
from monai_petl.handlers import AdapterSaver
from tests.conftest import RankOne, SmallNet, shake_statistics


class Score:
    """A metric that gives one of the given values a run."""

    def __init__(self, values: list[float]) -> None:
        self.values = iter(values)

    def attach(self, engine: Engine, name: str) -> None:
        @engine.on(Events.EPOCH_COMPLETED)
        def set_metric() -> None:
            engine.state.metrics[name] = next(self.values)


def evaluator(network: torch.nn.Module, scores: list[float], saver: AdapterSaver) -> SupervisedEvaluator:
    batch: dict[str, Any] = {"image": torch.zeros(1, 1, 4, 4), "label": torch.zeros(1, 2)}
    metric: Any = {"score": Score(scores)}
    return SupervisedEvaluator("cpu", [batch], network, key_val_metric=metric, val_handlers=[saver])


def adapted() -> SmallNet:
    network = SmallNet()
    adapt(network, RankOne(), name="first")
    return network


def set_up(network: SmallNet, value: float) -> None:
    """Set the trained tensors to a value."""
    torch.nn.init.constant_(network.linear.delta.up, value)


def test_evaluator_keeps_the_adapter_of_the_best_validation(tmp_path: Path) -> None:
    network, path = adapted(), tmp_path / "adapters" / "first.safetensors"
    engine = evaluator(network, [0.2, 0.7, 0.5], AdapterSaver(network, path, notes={"volumes": 3}))
    for epoch in (1, 2, 3):
        set_up(network, float(epoch))
        engine.run(epoch)
    assert inspect_adapter(path)["notes"] == {"volumes": 3, "epoch": 2, "score": 0.7}
    torch.manual_seed(0)
    fresh = SmallNet()
    fresh.load_state_dict({n: t for n, t in network.state_dict().items() if "delta" not in n})
    load_adapter(fresh, path)
    assert (fresh.linear.delta.up == 2).all()


def test_trainer_writes_once_at_the_end(tmp_path: Path) -> None:
    network, path = adapted(), tmp_path / "first.safetensors"
    trainer = Engine(lambda engine, batch: None)
    AdapterSaver(network, path).attach(trainer)
    written: list[bool] = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: written.append(path.exists()))
    trainer.run([0], max_epochs=2)
    assert written == [False, False]
    assert inspect_adapter(path)["notes"] == {"epoch": 2}


def test_an_adapter_is_chosen_by_name(tmp_path: Path) -> None:
    network = shake_statistics(adapted())
    adapt(network, [], also_train=["out"], name="second")
    trainer = Engine(lambda engine, batch: None)
    for name in ("first", None):
        AdapterSaver(network, tmp_path / f"{name}.safetensors", name).attach(trainer)
    trainer.run([0])
    assert inspect_adapter(tmp_path / "first.safetensors")["name"] == "first"
    assert inspect_adapter(tmp_path / "None.safetensors")["name"] == "second"


def test_place_that_cannot_be_written_is_named_before_the_first_epoch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    saver = AdapterSaver(adapted(), tmp_path / "file" / "first.safetensors")
    with pytest.raises(OSError, match=r"cannot write the adapter to .*first\.safetensors"):
        saver.attach(Engine(lambda engine, batch: None))
