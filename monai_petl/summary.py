"""What a network costs to train: parameters, activations kept for the backward pass, and seconds a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Summary", "saved_activation_bytes", "step_seconds", "summary"]


@dataclass(frozen=True)
class Summary:
    """Number of values in a network; ``str()`` is a table.

    Attributes:
        total, trainable, frozen: parameters.
        fraction: trainable / total.
        rows: (module, total, trainable) for each top-level module.
    """

    total: int
    trainable: int
    frozen: int
    fraction: float
    rows: tuple[tuple[str, int, int], ...] = ()

    def __str__(self) -> str:
        lines = [f"{'module':<24}{'parameters':>14}{'trainable':>14}"]
        lines += [f"{name:<24}{total:>14,}{trainable:>14,}" for name, total, trainable in self.rows]
        lines.append(f"{'total':<24}{self.total:>14,}{self.trainable:>14,}")
        lines.append(f"{self.trainable:,} of {self.total:,} parameters train: {100 * self.fraction:.2f} %")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, float]:
        """The four figures by name."""
        return {"total": self.total, "trainable": self.trainable, "frozen": self.frozen, "fraction": self.fraction}


def summary(network: nn.Module) -> Summary:
    """Count the parameters of a network."""
    rows = [(name, *_count(module)) for name, module in network.named_children()]
    own = list(network.parameters(recurse=False))
    if own:
        rows.append(("(own)", sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)))
    total, trainable = _count(network)
    fraction = trainable / total if total else 0.0
    return Summary(total, trainable, total - trainable, fraction, tuple(r for r in rows if r[1]))


def saved_activation_bytes(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of ``forward()``, each storage counted once.

    Parameters and buffers of ``network`` do not count: they are there anyway.
    """
    there = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}
    holders = []  # keeps storages alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
            holders.append(storage)
        return tensor.detach()  # an output that kept its own graph would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def step_seconds(step: Callable[[], object], repeats: int = 5) -> float:
    """Median wall-clock seconds of one call, after one call to warm up."""
    step()
    times = []
    for _ in range(repeats):
        _synchronise()
        start = time.perf_counter()
        step()
        _synchronise()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _count(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
