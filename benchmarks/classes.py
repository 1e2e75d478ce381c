"""What does a volume cost to segment for one, four and eight classes, in separate passes and in one joint pass?

Floor: the products of the same passes at the machine's own rate (see forward.py).

    python benchmarks/classes.py
"""

from __future__ import annotations

from collections.abc import Sequence

import fire
import torch
from common import Products, interleaved, markdown, ratio, report
from monai.inferers import SlidingWindowInferer

from monai_petl.networks import PUNet


@torch.no_grad()
def main(
    counts: Sequence[int] = (1, 4, 8), slices: int = 16, batch_size: int = 4, repeats: int = 3, threads: int = 1
) -> None:
    """Sliding-window inference over the slices of one volume.

    Args:
        counts: numbers of classes.
        slices: slices of 224 x 224 voxels in the volume.
        batch_size: slices a forward pass.
        repeats: how often everything is repeated.
        threads: 1 measures processor time, more measure time on the clock.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    volume = torch.randn(1, 1, 224, 224, slices)
    inferer = SlidingWindowInferer(roi_size=(224, 224, 1), sw_batch_size=batch_size, overlap=0)
    batch = volume[0, ..., :batch_size].movedim(-1, 0).unsqueeze(-1)  # (B, 1, H, W, 1)
    names = [f"class{i}" for i in range(max(counts))]
    networks = {p: PUNet(classes=names, prompting=p).eval() for p in ("separate", "joint")}

    def segment(prompting: str, count: int) -> None:
        networks[prompting].active_classes = names[:count]
        inferer(volume, networks[prompting])

    cases = {f"{p}, {c} classes": (p, c) for p in networks for c in counts}
    seconds = interleaved({name: (lambda case=case: segment(*case)) for name, case in cases.items()}, repeats)
    floors = {}
    for name, (prompting, count) in cases.items():
        network = networks[prompting]
        network.active_classes = names[:count]
        products = Products.of(network, lambda network=network: network(batch))
        floors[name] = sum(products.seconds(repeats).values()) * slices / batch_size
    one = seconds[f"separate, {counts[0]} classes"]
    growth = {name: ratio(seconds[name], one) for name in cases}
    rows = [
        (
            prompting,
            count,
            f"{min(seconds[name]):.2f}",
            f"{growth[name]:.2f}",
            f"{growth[name] / count:.2f}",
            f"{min(seconds[name]) / floors[name]:.2f}",
        )
        for name, (prompting, count) in cases.items()
    ]
    most = counts[-1]
    report(
        "classes",
        [markdown(("prompting", "classes", "s a volume", "x one class", "x one class, per class", "x floor"), rows)],
        f"{most} classes cost {growth[f'separate, {most} classes']:.1f} times as much as one in separate passes and "
        f"{growth[f'joint, {most} classes']:.1f} times as much in a joint pass.",
        {
            "slices": slices,
            "batch_size": batch_size,
            "repeats": repeats,
            "seconds": seconds,
            "floor_seconds": floors,
            "times_one_class": growth,
        },
    )


if __name__ == "__main__":
    fire.Fire(main)
