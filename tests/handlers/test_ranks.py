from __future__ import annotations

from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from ignite.handlers import ProgressBar
from monai.handlers import CheckpointSaver, StatsHandler, ValidationHandler

from monai_petl.handlers import AdapterSaver, GradientClipping, for_this_rank, leave_group
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


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs the list of threads in /proc")
def test_no_thread_of_a_group_is_left_when_it_has_been_left(tmp_path: Path) -> None:
    def threads() -> set[str]:
        return {
            path.parent.name
            for path in Path("/proc/self/task").glob("*/comm")
            if "gloo" in path.read_text(encoding="utf-8")
        }

    before = threads()
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, world_size=1, rank=0)
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    network(torch.rand(4, 3)).sum().backward()
    assert threads() > before
    leave_group(network)
    assert threads() == before
    assert not torch.distributed.is_initialized()
