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

from monai_petl.networks import PUNet


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
    image = torch.randn(batch_size, 1, size, size, 1)
    networks = {
        "corrected, strided windows": PUNet(classes=("a",)).eval(),
        "corrected, contiguous windows": PUNet(classes=("a",), partition="block").eval(),
        "published": PUNet(classes=("a",), arithmetic="published").eval(),
    }
    for network in networks.values():
        for module in network.modules():  # statistics of a trained network, not 0 and 1
            if isinstance(module, torch.nn.BatchNorm3d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    published, classes = networks["published"], ["a"] * batch_size
    difference = (literal_forward(published, image, classes) - published(image, classes).logits).abs().max().item()
    if difference > 1e-4:
        raise RuntimeError(f"the literal pass differs from arithmetic='published' by {difference}")

    runs = {name: (lambda network=network: network(image)) for name, network in networks.items()}
    runs["published, literal"] = lambda: literal_forward(published, image, classes)
    default = networks["corrected, strided windows"]
    products = Products.of(default, runs["corrected, strided windows"])
    ways = products.timings()
    flat = {f"{name} {way}": run for name, (_, all_ways) in ways.items() for way, run in all_ways.items()}
    seconds = interleaved({**runs, **flat}, repeats)
    kinds = {"conv": [0.0] * repeats, "linear": [0.0] * repeats, "attention": [0.0] * repeats}
    for name, (count, all_ways) in ways.items():
        best = min((seconds[f"{name} {way}"] for way in all_ways), key=min)
        kind = kinds[name.split()[0]]
        for i in range(repeats):
            kind[i] += count * best[i]
    floor = [sum(parts) for parts in zip(*kinds.values(), strict=True)]
    rows = []
    for name in runs:
        each = min(seconds[name]) / batch_size
        share = f"{100 * ratio(floor, seconds[name]):.0f} %" if name.startswith("corrected") else ""
        faster = ratio(seconds["published, literal"], seconds[name])
        rows.append((name, f"{1e3 * each:.0f}", share, f"{faster:.2f}"))
    rows.append(("floor: products alone", f"{1e3 * min(floor) / batch_size:.0f}", "100 %", ""))
    parts = [(kind, f"{1e3 * min(s) / batch_size:.0f}") for kind, s in kinds.items()]
    rate = ratio(floor, seconds["corrected, strided windows"])
    speed = ratio(seconds["published, literal"], seconds["corrected, strided windows"])
    report(
        f"forward_{threads}_threads" if threads > 1 else "forward",
        [
            markdown(("forward pass", "ms a slice", "share of the machine's rate", "times the literal speed"), rows),
            markdown(("floor, by kind", "ms a slice"), parts),
        ],
        f"The default network runs at {100 * rate:.0f} % of the machine's own rate for its products "
        f"({products.flops() / batch_size / 1e9:.1f} GFLOP a slice; the target is 45 %), {1 / rate:.2f} times the "
        f"floor, and at {speed:.1f} times the speed of the literal pass (the target is 3).",
        {
            "batch_size": batch_size,
            "repeats": repeats,
            "size": size,
            "seconds": {name: seconds[name] for name in runs},
            "floor_seconds": kinds,
            "share_of_rate": rate,
            "times_literal_speed": speed,
            "literal_difference": difference,
            "gflop_a_slice": products.flops() / batch_size / 1e9,
        },
    )


if __name__ == "__main__":
    fire.Fire(main)
