"""Which handlers run in which process of a distributed training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
from ignite.handlers import ProgressBar
from monai.handlers import CheckpointSaver, StatsHandler, TensorBoardStatsHandler

from monai_petl.handlers.adapter_saver import AdapterSaver

__all__ = ["for_this_rank"]

WRITERS = (CheckpointSaver, AdapterSaver, StatsHandler, TensorBoardStatsHandler, ProgressBar)


def for_this_rank(handlers: Sequence[Any]) -> list[Any]:
    """All handlers in the first process; in the others only those that neither print nor write files.

    Args:
        handlers: a trainer's or an evaluator's handlers; ``None`` entries (disabled ones) are dropped.
    """
    first = idist.get_rank() == 0
    return [h for h in handlers if h is not None and (first or not isinstance(h, WRITERS))]
