from __future__ import annotations

from pathlib import Path

import ignite.distributed as idist
import pytest
from ignite.handlers import ProgressBar
from monai.handlers import CheckpointSaver, StatsHandler, ValidationHandler

from monai_petl.handlers import AdapterSaver, GradientClipping, for_this_rank
from tests.conftest import SmallNet


@pytest.fixture
def handlers(tmp_path: Path) -> list[object]:
    network = SmallNet()
    return [
        CheckpointSaver(str(tmp_path), {"network": network}),
        None,
        GradientClipping(),
        StatsHandler(),
        ProgressBar(),
        ValidationHandler(1),
        AdapterSaver(network, tmp_path / "a.safetensors"),
    ]


def test_first_process_keeps_all_but_disabled_handlers(handlers: list[object]) -> None:
    assert for_this_rank(handlers) == [handler for handler in handlers if handler is not None]


def test_other_processes_neither_print_nor_write(handlers: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    assert [type(handler) for handler in for_this_rank(handlers)] == [GradientClipping, ValidationHandler]
