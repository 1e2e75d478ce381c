"""What does a step of prompt tuning cost, against a step of full fine-tuning: time, kept activations, peak memory?

Floor of the time: the products of the forward pass at the machine's own rate (see forward.py), once for the forward pass,
once for the gradients of activations, and in full fine-tuning once for those of weights; attention products three times.
Floor of the kept bytes: queries, keys, values and outputs of attention, which every fused attention keeps.

    python benchmarks/training_step.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fire
import torch
import torch.nn.functional as F
from common import Products, adapted, interleaved, markdown, ratio, report

from monai_petl import summary, trainable_parameters
from monai_petl.core.summary import saved_activation_bytes

VARIANTS = ("prompt", "full")


def main(batch_size: int = 4, repeats: int = 5, threads: int = 1, size: int = 224) -> None:
    """Forward pass, loss, backward pass and AdamW step on a batch of slices.

    Args:
        batch_size: slices a step.
        repeats: how often everything is repeated.
        threads: 1 measures processor time, more measure time on the clock.
        size: edge of a slice in voxels.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    image, label = torch.randn(batch_size, 1, size, size, 1), torch.randint(0, 2, (batch_size, size, size, 1))
    classes = ["new"] * batch_size
    networks = {method: adapted(method) for method in VARIANTS}
    optimizers = {v: torch.optim.AdamW(trainable_parameters(n), lr=0.0) for v, n in networks.items()}

    def step(method: str) -> None:
        loss = F.cross_entropy(networks[method](image, classes).logits, label)
        loss.backward()
        optimizers[method].step()
        optimizers[method].zero_grad()

    seconds = interleaved({v: (lambda v=v: step(v)) for v in VARIANTS}, repeats)
    products = Products.of(networks["prompt"], lambda: networks["prompt"](image, classes))
    floor = products.seconds(repeats)
    kept = {v: saved_activation_bytes(n, lambda n=n: n(image, classes)) for v, n in networks.items()}
    attention = sum(4 * c * b * 2 * (n + m) * w for (b, n, m, w), c in products.attentions.items())
    peak = {v: _peak(v, batch_size, size, threads) for v in VARIANTS}
    rows, floors = [], {}
    for v in VARIANTS:
        passes = 2 if v == "prompt" else 3
        floors[v] = passes * (floor["conv"] + floor["linear"]) + 3 * floor["attention"]
        rows.append(
            (
                v,
                f"{summary(networks[v]).trainable:,}",
                f"{1e3 * min(seconds[v]) / batch_size:.0f}",
                f"{min(seconds[v]) / floors[v]:.2f}",
                f"{kept[v] / batch_size / 1e6:.0f}",
                f"{kept[v] / attention:.2f}",
                f"{peak[v]['step'] / 1e6:.0f}",
            )
        )
    time_ratio = ratio(seconds["prompt"], seconds["full"])
    kept_ratio, peak_ratio = kept["prompt"] / kept["full"], peak["prompt"]["step"] / peak["full"]["step"]
    rows.append(("prompt / full", "", f"{time_ratio:.2f}", "", f"{kept_ratio:.2f}", "", f"{peak_ratio:.2f}"))
    header = ("method", "trained", "ms a slice", "x floor", "MB kept a slice", "x floor", "peak MB of a step")
    report(
        "training_step",
        [markdown(header, rows)],
        f"A step of prompt tuning takes {100 * time_ratio:.0f} % of the time of full fine-tuning, keeps "
        f"{100 * kept_ratio:.0f} % of its activations (the target is 60 %) and adds {100 * peak_ratio:.0f} % as much to "
        f"the peak memory of the process.",
        {
            "batch_size": batch_size,
            "repeats": repeats,
            "size": size,
            "seconds": seconds,
            "floor_seconds": floors,
            "kept_bytes": kept,
            "kept_floor_bytes": attention,
            "peak_bytes": peak,
            "time_ratio": time_ratio,
            "kept_ratio": kept_ratio,
        },
    )


def _peak(method: str, batch_size: int, size: int, threads: int) -> dict[str, int]:
    script = Path(__file__).with_name("peak_memory.py")
    options = [f"--batch_size={batch_size}", f"--size={size}", f"--threads={threads}"]
    result = subprocess.run(
        [sys.executable, script, method, *options], capture_output=True, encoding="utf-8", check=True
    )
    return json.loads(result.stdout)


if __name__ == "__main__":
    fire.Fire(main)
