"""A distributed training's processes: which handlers run in which, and how they part."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch.distributed
from ignite.handlers import ProgressBar
from monai.handlers import CheckpointSaver, StatsHandler, TensorBoardStatsHandler
from torch import nn

from monai_petl.handlers.adapter_saver import AdapterSaver

__all__ = ["for_this_rank", "leave_group"]

WRITERS = (CheckpointSaver, AdapterSaver, StatsHandler, TensorBoardStatsHandler, ProgressBar)


def for_this_rank(handlers: Sequence[Any]) -> list[Any]:
    """All handlers in the first process; in the others only those that neither print nor write files.

    Args:
        handlers: a trainer's or an evaluator's handlers; ``None`` entries (disabled ones) are dropped.
    """
    first = idist.get_rank() == 0
    return [h for h in handlers if h is not None and (first or not isinstance(h, WRITERS))]


def leave_group(network: nn.Module) -> None:
    """End this process's part in the group, last of all.

    The wrapper and its reducer hold the group too, whose threads run on as long as anything does; when Python ends before
    them, it now and then waits for ever or takes the process down. So both let go of it first.

    Args:
        network: the ``DistributedDataParallel``, which cannot train any more afterwards.
    """
    for name in ("logger", "reducer", "process_group"):
        network.__dict__.pop(name, None)
    gc.collect()
    torch.distributed.destroy_process_group()
