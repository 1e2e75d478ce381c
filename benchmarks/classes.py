"""What does a volume cost to segment for one, four and eight classes, in separate passes and in one joint pass?

Floor: the products of the same passes at the machine's own rate (see forward.py).

    python benchmarks/classes.py
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import fire
import torch
from common import Products, interleaved, markdown, ratio, report
from monai.inferers import SlidingWindowInferer

from monai_petl.networks import PUNet


@torch.no_grad()
def main(
    counts: Sequence[int] = (1, 4, 8),
    batch_sizes: Sequence[int] = (1, 4),
    slices: int = 8,
    repeats: int = 3,
    threads: int = 1,
) -> None:
    """Sliding-window inference over the slices of one volume.

    Args:
        counts: numbers of classes, beginning with 1.
        batch_sizes: slices a forward pass.
        slices: slices of 224 x 224 voxels in the volume.
        repeats: how often everything is repeated.
        threads: 1 measures processor time, more measure time on the clock.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    volume = torch.randn(1, 1, 224, 224, slices)
    names = [f"class{i}" for i in range(max(counts))]
    networks = {p: PUNet(classes=names, prompting=p).eval() for p in ("separate", "joint")}

    def segment(batch_size: int, prompting: str, count: int) -> None:
        networks[prompting].active_classes = names[:count]
        inferer = SlidingWindowInferer(roi_size=(224, 224, 1), sw_batch_size=batch_size, overlap=0)
        inferer(volume, networks[prompting])

    cases = list(product(batch_sizes, networks, counts))
    runs = {str(case): (lambda case=case: segment(*case)) for case in cases}
    seconds = interleaved(runs, repeats)
    rows, floors, growth = [], {}, {}
    for batch_size, prompting, count in cases:
        name, network = str((batch_size, prompting, count)), networks[prompting]
        network.active_classes = names[:count]
        products = Products.of(network, lambda network=network: network(volume[..., :1]))
        floors[name] = sum(products.seconds(repeats).values()) * slices
        growth[name] = ratio(seconds[name], seconds[str((batch_size, "separate", 1))])
        each = f"{growth[name] / count:.2f}"
        cells = (f"{min(seconds[name]):.2f}", f"{growth[name]:.2f}", each, f"{min(seconds[name]) / floors[name]:.2f}")
        rows.append((prompting, batch_size, count, *cells))
    many, batch_size = counts[-1], batch_sizes[0]
    separate, joint = (growth[str((batch_size, p, many))] for p in networks)
    report(
        "classes",
        [markdown(("prompting", "slices a pass", "classes", "s a volume", "x one class", "a class", "x floor"), rows)],
        f"{many} classes cost {separate:.1f} times as much as one in separate passes and {joint:.1f} times as much in a "
        f"joint pass, slice by slice.",
        {"slices": slices, "repeats": repeats, "seconds": seconds, "floor_seconds": floors, "times_one_class": growth},
    )


if __name__ == "__main__":
    fire.Fire(main)
