"""What does LoRA cost a forward pass, attached and merged?

Floor of what an attached adapter adds: its two products at each layer, x A into memory that is there already and (x A) B added
to the queries and values in place, at the machine's own rate. A merged adapter adds nothing.

    python benchmarks/lora.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median

import fire
import torch
from common import interleaved, markdown, ratio, report
from monai.networks.nets import SwinUNETR, ViT
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from monai_petl import adapt, merge, summary, trainable_parameters
from monai_petl.deltas import deltas_of
from monai_petl.methods import LoRA

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ViT-B/16, 224 x 224 x 3": (lambda: ViT(3, (224, 224), (16, 16), spatial_dims=2), (1, 3, 224, 224)),
    "SwinUNETR 24, 96 x 96 x 96": (lambda: SwinUNETR(1, 3, feature_size=24), (1, 1, 96, 96, 96)),
}


def main(repeats: int = 7, threads: int = 1, rank: int = 8) -> None:
    """Forward passes without gradients: the backbone, with LoRA on q and v, and with the same LoRA merged.

    Args:
        repeats: how often everything is repeated.
        threads: 1 measures processor time, more measure time on the clock.
        rank: of the adapter.
    """
    torch.set_num_threads(threads)
    rows, record = [], {}
    for name, (make, shape) in NETWORKS.items():
        with torch.no_grad():
            measured = measure(make, shape, repeats, rank)
        record[name] = measured
        rows.append(
            (
                name,
                f"{measured['trained']:,}",
                f"{1e3 * median(measured['seconds']['backbone']):.0f}",
                f"{measured['attached']:.3f}",
                f"{measured['merged']:.3f}",
                f"{100 * measured['operations']:.2f} %",
                f"{100 * measured['deltas']:.2f} %",
                f"{measured['deltas'] / measured['floor']:.2f}",
            )
        )
    header = (
        "forward pass",
        "trained",
        "ms",
        "x with LoRA",
        "x merged",
        "operations added",
        "time of the deltas",
        "x floor",
    )
    attached, merged, deltas = (max(r[key] for r in record.values()) for key in ("attached", "merged", "deltas"))
    report(
        "lora",
        [markdown(header, rows)],
        f"With LoRA on q and v (rank {rank}) attached, the forward pass takes at most {attached:.3f} times as long (the target "
        f"is 1.10); the deltas by themselves take at most {100 * deltas:.1f} % of it. Merged, the network computes what the "
        f"backbone computes, layer by layer: that {merged:.3f} is not 1 is the noise of these ratios.",
        {"repeats": repeats, "rank": rank, "measured": record},
    )


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], repeats: int, rank: int) -> dict:
    """Seconds of whole passes in turns, and of the deltas alone and their floor as shares of a pass."""
    torch.manual_seed(0)
    backbone, image = make().eval(), torch.randn(shape)
    attached = adapt(copy.deepcopy(backbone), LoRA(rank=rank)).eval()
    for parameter in trainable_parameters(attached):
        nn.init.normal_(parameter, std=0.02)
    networks = {"backbone": backbone, "attached": attached, "merged": merge(copy.deepcopy(attached))}
    seconds = interleaved({n: (lambda network=network: network(image)) for n, network in networks.items()}, repeats)
    parts = interleaved(delta_runs(attached, image), max(repeats, 15))
    whole = median(seconds["backbone"])
    shares = {
        kind: sum(median(times) for n, times in parts.items() if n.startswith(kind)) / whole
        for kind in ("deltas", "floor")
    }
    return {
        "trained": summary(attached).trainable,
        "seconds": seconds,
        "attached": ratio(seconds["attached"], seconds["backbone"]),
        "merged": ratio(seconds["merged"], seconds["backbone"]),
        "operations": operations(attached, image) / operations(backbone, image) - 1,
        **shares,
    }


def delta_runs(network: nn.Module, image: Tensor) -> dict[str, Callable[[], object]]:
    """Each delta by itself on the layer's input and output, and its products alone."""
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
        runs[f"deltas {i}"] = lambda delta=delta, x=x, y=y: delta(x, y)
        runs[f"floor {i}"] = products(x.flatten(0, -2), y.shape[-1] // 3, len(delta.slots), delta.rank)
    return runs


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
