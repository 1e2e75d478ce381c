"""What the benchmarks share: interleaved timing, the products inside a forward pass, tables and records."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import monai
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_petl import adapt
from monai_petl.methods import punet_method
from monai_petl.networks import PUNet
from monai_petl.networks.punet.attention import PromptAttention

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call; the functions take turns, so that whatever else the machine does hits all of them.

    With one thread these are seconds of processor time of this process, which do not count time given to others; with
    several threads they are seconds on the clock.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return seconds


def ratio(upper: Sequence[float], lower: Sequence[float]) -> float:
    """Median over the repetitions of upper / lower: both of a repetition were measured side by side."""
    return median(a / b for a, b in zip(upper, lower, strict=True))


@dataclass
class Products:
    """Sizes of the convolutions, linear layers and attention products of one forward pass, with their counts."""

    convolutions: dict[tuple, int] = field(default_factory=dict)
    linears: dict[tuple, int] = field(default_factory=dict)
    attentions: dict[tuple, int] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module, run: Callable[[], object]) -> Products:
        """The products of ``run()``, a forward pass of ``network`` on slices."""
        found = cls()

        def count(sizes: dict[tuple, int], key: tuple) -> None:
            sizes[key] = sizes.get(key, 0) + 1

        def convolution(module: nn.Conv3d, inputs: tuple[Tensor], _: Tensor) -> None:
            key = (tuple(inputs[0].shape[:4]), tuple(module.weight.shape[:4]), module.stride[:2], module.padding[:2])
            count(found.convolutions, key)

        def linear(module: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> None:
            rows = inputs[0].numel() // module.in_features
            count(found.linears, (rows, module.in_features, module.out_features))

        def attention(module: PromptAttention, inputs: tuple, _: Tensor) -> None:
            x, plan, prompt = inputs
            tokens = 0 if prompt is None else prompt.key.shape[2]
            batch, width = len(x) * plan.num_windows * module.num_heads, x.shape[-1] // module.num_heads
            count(found.attentions, (batch, plan.window_voxels, plan.window_voxels + tokens, width))

        hooks: dict[type, Callable] = {nn.Conv3d: convolution, nn.Linear: linear, PromptAttention: attention}
        handles = [
            module.register_forward_hook(hook)
            for module in network.modules()
            for kind, hook in hooks.items()
            if isinstance(module, kind)
        ]
        run()
        for handle in handles:
            handle.remove()
        return found

    def ways(self) -> dict[tuple[str, tuple], dict[str, Callable[[], object]]]:
        """Each product in different memory layouts, into memory that is there already: (kind, size) -> layout -> call."""
        ways: dict[tuple[str, tuple], dict[str, Callable[[], object]]] = {}
        for key in self.convolutions:
            ways["conv", key] = _ways_of_convolution(*key)
        for key in self.linears:
            ways["linear", key] = _ways_of_linear(*key)
        for key in self.attentions:
            batch, queries, keys, width = key
            ways["scores", key] = ways_of_products(batch, queries, width, keys)
            ways["values", key] = ways_of_products(batch, queries, keys, width)
        return ways

    def runs(self) -> dict[str, Callable[[], object]]:
        """All of :meth:`ways` under names, for :func:`interleaved`."""
        return {f"{case} {layout}": run for case, layouts in self.ways().items() for layout, run in layouts.items()}

    def floor(self, seconds: dict[str, list[float]]) -> dict[str, list[float]]:
        """Seconds of every repetition by kind, each product in its fastest layout, from the times of :meth:`runs`."""
        repeats = len(next(iter(seconds.values())))
        floor = {kind: [0.0] * repeats for kind in ("conv", "linear", "attention")}
        for kind, sizes in (
            ("conv", self.convolutions),
            ("linear", self.linears),
            ("scores", self.attentions),
            ("values", self.attentions),
        ):
            total = floor[kind if kind in floor else "attention"]
            for key, count in sizes.items():
                best = min((s for name, s in seconds.items() if name.startswith(f"{(kind, key)} ")), key=min)
                total[:] = (t + count * b for t, b in zip(total, best, strict=True))
        return floor

    def seconds(self, repeats: int) -> dict[str, float]:
        """Fewest seconds of convolutions, linear layers and attention products, measured now."""
        return {kind: min(times) for kind, times in self.floor(interleaved(self.runs(), repeats)).items()}

    def flops(self) -> float:
        """Multiplications and additions."""
        total = 0.0
        for (image, kernel, stride, _), count in self.convolutions.items():
            outputs = image[0] * -(-image[2] // stride[0]) * -(-image[3] // stride[1])
            total += 2 * count * outputs * kernel[0] * kernel[1] * kernel[2] * kernel[3]
        total += sum(2 * count * rows * a * b for (rows, a, b), count in self.linears.items())
        return total + sum(4 * count * b * n * m * c for (b, n, m, c), count in self.attentions.items())


def _ways_of_convolution(
    image: Sequence[int], kernel: Sequence[int], stride: tuple, padding: tuple
) -> dict[str, Callable]:
    planar, weight = torch.randn(image), torch.randn(kernel)
    last, weight_last = (t.contiguous(memory_format=torch.channels_last) for t in (planar, weight))
    return {
        "channels last": torch.no_grad()(lambda: F.conv2d(last, weight_last, None, stride, padding)),
        "channels first": torch.no_grad()(lambda: F.conv2d(planar, weight, None, stride, padding)),
    }


def _ways_of_linear(rows: int, inputs: int, outputs: int) -> dict[str, Callable]:
    x, weight, out = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.empty(rows, outputs)
    transposed = weight.T.contiguous()
    return {
        "weight": lambda: torch.mm(x, weight.T, out=out),
        "transposed weight": lambda: torch.mm(x, transposed, out=out),
    }


def ways_of_products(batch: int, rows: int, inner: int, columns: int) -> dict[str, Callable]:
    """Ways to compute ``batch`` products of (rows, inner) and (inner, columns)."""
    a, b = torch.randn(batch, rows, inner), torch.randn(batch, inner, columns)
    a_t, b_t, out = a.mT.contiguous().mT, b.mT.contiguous().mT, torch.empty(batch, rows, columns)
    return {
        "plain": lambda: torch.bmm(a, b, out=out),
        "left transposed": lambda: torch.bmm(a_t, b, out=out),
        "right transposed": lambda: torch.bmm(a, b_t, out=out),
    }


def adapted(method: str, **options: Any) -> PUNet:
    """A PUNet in training mode that learns the class ``"new"`` by a method of the paper."""
    torch.manual_seed(0)
    network = PUNet(classes=("base",), **options)
    chosen = punet_method(method, "new")
    adapt(network, chosen.methods, chosen.also_train)
    return network.train()


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def report(name: str, tables: Sequence[str], reading: str, record: dict[str, Any]) -> None:
    """Print the tables and a sentence on them, and write results/<name>.json."""
    print("\n\n".join([*tables, reading]))
    RESULTS.mkdir(exist_ok=True)
    whole = {**circumstances(), **record, "tables": list(tables), "reading": reading}
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def circumstances() -> dict[str, Any]:
    """Processor, threads, versions and date."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "date": str(date.today()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
