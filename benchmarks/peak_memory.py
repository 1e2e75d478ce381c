"""Peak memory of one training step, in a process of its own (Linux); training_step.py calls it.

python benchmarks/peak_memory.py prompt --batch_size 4
"""

from __future__ import annotations

import json
from pathlib import Path

import fire
import torch
from common import adapted

from monai_petl import trainable_parameters


def main(method: str, batch_size: int = 4, size: int = 224, threads: int = 1) -> None:
    """Print the peak resident bytes before the first step, after two steps, and their difference.

    Args:
        method: ``"prompt"`` or ``"full"``, see :data:`monai_petl.methods.PUNET_METHODS`.
        batch_size: slices a step.
        size: edge of a slice in voxels.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    network = adapted(method)
    optimizer = torch.optim.AdamW(trainable_parameters(network))
    image = torch.randn(batch_size, 1, size, size, 1)
    before = peak_bytes()
    for _ in range(2):
        network(image, ["new"] * batch_size).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps({"before": before, "after": peak_bytes(), "step": peak_bytes() - before}))


def peak_bytes() -> int:
    """Largest resident size so far. ``ru_maxrss`` would include that of the process that started this one."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    fire.Fire(main)
