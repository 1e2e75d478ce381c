"""What a network costs to train: parameters, memory, operations and seconds a step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from monai_petl.core.wrappers import on_plain

__all__ = [
    "StepCost",
    "Summary",
    "TensorMemory",
    "measure_step",
    "saved_activation_bytes",
    "step_seconds",
    "summary",
]


CPU_ATTENTION = {  # fused attention on CPUs, which torch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Summary:
    """Number of values in a network; ``str()`` is a table.

    Attributes:
        total, trainable, frozen: parameters.
        fraction: trainable / total.
        rows: (module, total, trainable) for each top-level module.
        notes: what was found out about the network, such as its head.
    """

    total: int
    trainable: int
    frozen: int
    fraction: float
    rows: tuple[tuple[str, int, int], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{'module':<24}{'parameters':>14}{'trainable':>14}"]
        lines += [f"{name:<24}{total:>14,}{trainable:>14,}" for name, total, trainable in self.rows]
        lines.append(f"{'total':<24}{self.total:>14,}{self.trainable:>14,}")
        lines.append(f"{self.trainable:,} of {self.total:,} parameters train: {100 * self.fraction:.2f} %")
        lines += self.notes
        return "\n".join(lines)

    def to_dict(self) -> dict[str, float]:
        """The four figures by name."""
        return {"total": self.total, "trainable": self.trainable, "frozen": self.frozen, "fraction": self.fraction}


@on_plain
def summary(network: nn.Module) -> Summary:
    """Count the parameters of a network, each once."""
    rows = [(name, *_count(module)) for name, module in network.named_children()]
    own = list(network.parameters(recurse=False))
    if own:
        rows.append(("(own)", sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)))
    total, trainable = _count(network)
    fraction = trainable / total if total else 0.0
    heads = network.__dict__.get("_head_found", {})
    notes = tuple(
        f"head of {name}: {', '.join(layers)} (found where the output comes from)" for name, layers in heads.items()
    )
    return Summary(total, trainable, total - trainable, fraction, tuple(r for r in rows if r[1]), notes)


@dataclass(frozen=True)
class StepCost:
    """What a training step costs, measured.

    Attributes:
        saved_bytes: of the tensors that autograd keeps for the backward pass.
        peak_bytes: the most that all tensors take at once: parameters, buffers, gradients, the optimiser's state,
            activations. On CUDA the allocator's maximum, else that of :class:`TensorMemory`.
        forward_flops, flops: of the forward pass and of the whole step, by torch's counter: matrix products, convolutions
            and attention, a multiplication with its addition counting as two.
        seconds: median on the clock.
    """

    saved_bytes: int
    peak_bytes: int
    forward_flops: int
    flops: int
    seconds: float


def measure_step(
    network: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None = None, repeats: int = 3
) -> StepCost:
    """Measure forward pass, backward pass and optimiser step.

    Args:
        network: in training mode; what trains changes, unless the optimiser's rates are 0.
        loss: runs the network on a batch and returns the loss.
        optimizer: default AdamW of rate 0 over what trains.
        repeats: steps whose time is taken.
    """
    chosen = optimizer or torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.0)

    def step() -> None:
        loss().backward()
        chosen.step()
        chosen.zero_grad()

    seconds = step_seconds(step, repeats)  # also makes the optimiser's state
    saved = saved_activation_bytes(network, loss)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as forward:
        value = loss()
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as backward:
        value.backward()
    del value
    chosen.zero_grad()
    device = next(network.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        state = (t for values in chosen.state.values() for t in values.values() if isinstance(t, Tensor))
        with TensorMemory((*network.parameters(), *network.buffers(), *state)) as memory:
            step()
        peak = memory.peak_bytes
    first = forward.get_total_flops()
    return StepCost(saved, peak, first, first + backward.get_total_flops(), seconds)


class TensorMemory(TorchDispatchMode):
    """Accounts for the bytes of all tensors that are made while it is open: an allocator's statistics for CPUs.

    Args:
        resident: tensors that are there already and count, such as the parameters.

    Attributes:
        bytes: of the tensors that are alive now.
        peak_bytes: the most so far. What libraries use inside an operation is not seen.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        for tensor in resident:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive and self._alive[key][0]() is storage:
            return

        def gone(reference: weakref.ref) -> None:
            held = self._alive.get(key)
            if held is not None and held[0] is reference:
                del self._alive[key]
                self.bytes -= held[1]

        self._alive[key] = (weakref.ref(storage, gone), storage.nbytes())
        self.bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.bytes)


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
