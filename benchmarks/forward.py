"""How fast is the forward pass, against the machine's own rate for its products and against a literal transcription?

Floor: every convolution, linear layer and attention product (scores, values) of the forward pass, timed alone on tensors
of the same sizes, in the fastest layout, into memory that is there already. Softmax, normalisation, copies and everything
else count nothing in it.

    python benchmarks/forward.py
    python benchmarks/forward.py --threads 2 --batch_size 8
"""

from __future__ import annotations

import fire
import torch
from common import Products, interleaved, markdown, ratio, report
from literal_punet import literal_forward
from torch import Tensor

from monai_petl.networks import PUNet

DEFAULT, BLOCK, PUBLISHED = "default: strided windows", "contiguous windows", "published arithmetic"
LITERAL = "published arithmetic, literally"


@torch.no_grad()
def main(batch_size: int = 4, repeats: int = 7, threads: int = 1, size: int = 224) -> None:
    """Forward passes of a batch of slices in evaluation mode with one class.

    Args:
        batch_size: slices a forward pass.
        repeats: how often everything is repeated.
        threads: 1 measures processor time, more measure time on the clock.
        size: edge of a slice in voxels.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    image, classes = torch.randn(batch_size, 1, size, size, 1), ["a"] * batch_size
    networks = {
        DEFAULT: _network(),
        BLOCK: _network(partition="block"),
        PUBLISHED: _network(arithmetic="published"),
    }
    difference = _check_literal(networks[PUBLISHED], image)
    runs = {name: (lambda network=network: network(image)) for name, network in networks.items()}
    runs[LITERAL] = lambda: literal_forward(networks[PUBLISHED], image, classes)
    products = Products.of(networks[DEFAULT], runs[DEFAULT])
    seconds = interleaved({**runs, **products.runs()}, repeats)
    kinds = products.floor(seconds)
    floor = [sum(parts) for parts in zip(*kinds.values(), strict=True)]
    share = {name: ratio(floor, seconds[name]) for name in (DEFAULT, BLOCK)}
    speed = {name: ratio(seconds[LITERAL], seconds[name]) for name in runs}
    rows = [
        (
            name,
            f"{1e3 * min(seconds[name]) / batch_size:.0f}",
            f"{100 * share[name]:.0f} %" if name in share else "",
            f"{speed[name]:.2f}",
        )
        for name in runs
    ]
    rows.append(("floor: products alone", f"{1e3 * min(floor) / batch_size:.0f}", "100 %", ""))
    parts = [(kind, f"{1e3 * min(s) / batch_size:.0f}") for kind, s in kinds.items()]
    gflop = products.flops() / batch_size / 1e9
    report(
        "forward" if threads == 1 else f"forward_{threads}_threads",
        [
            markdown(("forward pass", "ms a slice", "of the machine's rate", "x literal speed"), rows),
            markdown(("floor, by kind", "ms a slice"), parts),
        ],
        f"The default network runs at {100 * share[DEFAULT]:.0f} % of the machine's own rate for its {gflop:.1f} GFLOP a "
        f"slice (the target is 45 %), {1 / share[DEFAULT]:.2f} times the floor, and {speed[DEFAULT]:.1f} times as fast "
        f"as the literal pass (the target is 3).",
        {
            "batch_size": batch_size,
            "repeats": repeats,
            "size": size,
            "seconds": {name: seconds[name] for name in runs},
            "floor_seconds": kinds,
            "share_of_rate": share,
            "times_literal_speed": speed,
            "literal_difference": difference,
            "gflop_a_slice": gflop,
        },
    )


def _network(**options: str) -> PUNet:
    network = PUNet(classes=("a",), **options).eval()
    for module in network.modules():  # statistics of a trained network, not 0 and 1
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return network


def _check_literal(network: PUNet, image: Tensor) -> float:
    classes = ["a"] * len(image)
    difference = (literal_forward(network, image, classes) - network(image, classes).logits).abs().max().item()
    if difference > 1e-5:
        raise RuntimeError(f"the literal pass differs from arithmetic='published' by {difference}")
    return difference


if __name__ == "__main__":
    fire.Fire(main)
