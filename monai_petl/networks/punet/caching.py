"""Values that are computed once and kept for as long as the tensors they come from do not change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["TensorCache"]

T = TypeVar("T")


class TensorCache(Generic[T]):
    """Remembers the values of recent keys. An in-place change or a replacement of a source tensor forgets the value.

    Nothing is remembered while gradients are recorded, or while the program is traced, compiled or exported. Values that
    were computed under automatic mixed precision are used at that precision only. A write through ``tensor.data`` does not
    count as a change in torch and is not noticed: write under ``torch.no_grad()`` instead.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.values: dict[Hashable, tuple[list[Tensor], tuple, T]] = {}

    def get(self, key: Hashable, sources: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """The remembered value of ``key``, or ``compute()``."""
        if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return compute()
        if any(source.is_inference() for source in sources):  # such tensors do not count their changes
            return compute()
        device = sources[0].device.type if sources else "cpu"
        key = (key, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device))
        stamp = tuple((id(source), source.data_ptr(), source._version) for source in sources)
        known = self.values.get(key)
        if known is not None and known[1] == stamp:
            return known[2]
        value = compute()
        self.values[key] = (list(sources), stamp, value)  # a source that is held cannot lend its id to another tensor
        while len(self.values) > self.size:
            self.values.pop(next(iter(self.values)))
        return value

    def __getstate__(self) -> dict[str, object]:
        return {"size": self.size, "values": {}}  # copies and files start empty
