"""What does LoRA cost a forward pass, attached and merged, and a training step?

Floor of what an attached adapter adds: its two products at each layer, at the machine's own rate and into memory that is there
already. Beside a linear layer these are x A and (x A) B, added to the queries and values in place; of a convolution B A, added
to the weight in place, where that is how it runs. A merged adapter adds nothing.

    python benchmarks/lora.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median

import fire
import torch
from common import interleaved, markdown, ratio, report
from monai.networks.nets import SegResNet, SwinUNETR, UNet, ViT
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from monai_petl import adapt, merge, summary, trainable_parameters
from monai_petl.core.deltas import deltas_of
from monai_petl.methods import LoRA

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ViT-B/16, 224 x 224 x 3": (lambda: ViT(3, (224, 224), (16, 16), spatial_dims=2), (1, 3, 224, 224)),
    "SwinUNETR 24, 96 x 96 x 96": (lambda: SwinUNETR(1, 3, feature_size=24), (1, 1, 96, 96, 96)),
    "UNet, 64 x 64 x 64": (
        lambda: UNet(3, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2),
        (1, 1, 64, 64, 64),
    ),
    "SegResNet 32, 64 x 64 x 64": (lambda: SegResNet(3, 32, 1, 2), (1, 1, 64, 64, 64)),
}
HEADER = (
    "forward pass",
    "trained",
    "ms",
    "x with LoRA",
    "x merged",
    "operations added",
    "in training",
    "time of the deltas",
    "x floor",
    "training step, x full",
)


def main(repeats: int = 7, threads: int = 1, rank: int = 8) -> None:
    """Forward passes without gradients: the backbone, with LoRA (on q and v, or on all convolutions), and with it merged.

    Args:
        repeats: how often everything is repeated.
        threads: 1 measures processor time, more measure time on the clock.
        rank: of the adapter.
    """
    torch.set_num_threads(threads)
    record = {name: measure(make, shape, repeats, rank) for name, (make, shape) in NETWORKS.items()}
    rows = [
        (
            name,
            f"{found['trained']:,}",
            f"{1e3 * median(found['seconds']['backbone']):.0f}",
            f"{found['attached']:.3f}",
            f"{found['merged']:.3f}",
            f"{100 * found['operations']:.2f} %",
            f"{100 * found['operations_in_training']:.2f} %",
            f"{100 * found['deltas']:.2f} %",
            f"{found['deltas'] / found['floor']:.2f}",
            f"{found['step']:.2f}",
        )
        for name, found in record.items()
    ]
    reading = reading_of(record, rank)
    report("lora", [markdown(HEADER, rows)], reading, {"repeats": repeats, "rank": rank, "measured": record})


def reading_of(record: dict[str, dict], rank: int) -> str:
    attached, merged, deltas, operations, training, step = (
        max(found[key] for found in record.values())
        for key in ("attached", "merged", "deltas", "operations", "operations_in_training", "step")
    )
    return (
        f"With LoRA (rank {rank}) attached, the forward pass takes at most {attached:.3f} times as long and "
        f"{100 * operations:.1f} % more operations (the target is 10 %); the deltas by themselves take at most "
        f"{100 * deltas:.1f} % of it. Merged, the network computes what the backbone computes, layer by layer: that "
        f"{merged:.3f} is not 1 is the noise of these ratios. In training the factors of a convolution stand beside it: up to "
        f"{100 * training:.0f} % more operations in the forward pass, and a step takes up to {step:.2f} times that of full "
        "fine-tuning, since convolutions to so few channels run far below the machine's rate."
    )


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], repeats: int, rank: int) -> dict:
    """Seconds of whole passes and of training steps in turns, and of the deltas alone and their floor as shares of a pass."""
    torch.manual_seed(0)
    backbone, image = make().eval(), torch.randn(shape)
    attached = adapt(copy.deepcopy(backbone), LoRA(rank=rank)).eval()
    for parameter in trainable_parameters(attached):
        nn.init.normal_(parameter, std=0.02)
    networks = {"backbone": backbone, "attached": attached, "merged": merge(copy.deepcopy(attached))}
    in_training = operations(attached, image) / operations(backbone, image) - 1
    with torch.no_grad():
        seconds = interleaved({n: (lambda network=network: network(image)) for n, network in networks.items()}, repeats)
        parts = interleaved(delta_runs(attached, image), max(repeats, 15))
        added = operations(attached, image) / operations(backbone, image) - 1
    steps = interleaved({"full": lambda: step(backbone, image), "lora": lambda: step(attached, image)}, repeats)
    whole = median(seconds["backbone"])
    shares = {
        kind: sum(median(times) for n, times in parts.items() if n.startswith(kind)) / whole
        for kind in ("deltas", "floor")
    }
    return {
        "trained": summary(attached).trainable,
        "seconds": seconds,
        "step_seconds": steps,
        "attached": ratio(seconds["attached"], seconds["backbone"]),
        "merged": ratio(seconds["merged"], seconds["backbone"]),
        "step": ratio(steps["lora"], steps["full"]),
        "operations": added,
        "operations_in_training": in_training,
        **shares,
    }


def step(network: nn.Module, image: Tensor) -> None:
    """A forward and a backward pass; the optimiser's own step is left out."""
    network.zero_grad()
    y = network(image)
    (y[0] if isinstance(y, tuple) else y).square().mean().backward()


def delta_runs(network: nn.Module, image: Tensor) -> dict[str, Callable[[], object]]:
    """What each delta does by itself on the layer's input and output or on its weight, and its products alone."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        seen[layer] = (inputs[0], y)

    pairs = deltas_of(network)
    handles = [layer.register_forward_hook(keep) for layer, _ in pairs]
    network(image)
    for handle in handles:
        handle.remove()
    runs: dict[str, Callable[[], object]] = {}
    for i, (layer, delta) in enumerate(pairs):
        x, y = seen[layer]
        if isinstance(layer, nn.Linear):
            run = lambda delta=delta, x=x, y=y: delta(x, y)  # noqa: E731
            floor = products(x.flatten(0, -2), y.shape[-1] // 3, len(delta.slots), delta.rank)
        elif delta.folded(layer.weight, x) is not None:
            run = lambda delta=delta, weight=layer.weight, x=x: delta.folded(weight, x)  # noqa: E731
            floor = products_of_weight(layer.weight, delta.rank)
        else:
            run = lambda delta=delta, x=x, y=y: delta(x, y)  # noqa: E731
            floor = lambda delta=delta, x=x: delta.B(delta.A(x))  # noqa: E731
        runs |= {f"deltas {i}": run, f"floor {i}": floor}
    return runs


def products_of_weight(weight: Tensor, rank: int) -> Callable[[], object]:
    """B A, added to the weight in place."""
    whole = torch.randn(weight.shape).flatten(1)
    up, down = torch.randn(len(whole), rank), torch.randn(rank, whole.shape[1])
    return lambda: whole.addmm_(up, down)


def products(x: Tensor, width: int, slots: int, rank: int) -> Callable[[], object]:
    """x A for all slots at once, and the product with B added to the outputs of each."""
    down, up = torch.randn(x.shape[1], slots * rank), torch.randn(slots, rank, width)
    inner, y = torch.empty(len(x), slots * rank), torch.randn(slots, len(x), width)

    def run() -> None:
        torch.mm(x, down, out=inner)
        for i in range(slots):
            y[i].addmm_(inner[:, i * rank : (i + 1) * rank], up[i])

    return run


def operations(network: nn.Module, image: Tensor) -> int:
    """Multiplications and additions of a pass."""
    with FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops()


if __name__ == "__main__":
    fire.Fire(main)
