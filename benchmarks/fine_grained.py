"""What do FPT and FPT+ cost at 512 pixels, against full fine-tuning: activations kept, peak of a step, seconds of an epoch?

With stored features the frozen transformer need not be in memory. Floor of the bytes kept: the stored keys and values and the
image that come in, and what goes into each block of the side network.
Floor of the time with stored features: the side network forward without prompts, and twice that for its backward pass.

    python benchmarks/fine_grained.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import fire
import torch
import torch.nn.functional as F
from common import interleaved, markdown, ratio, report
from torch import Tensor, nn

from monai_petl import adapt, summary, trainable_parameters
from monai_petl.methods import FullFineTuning, LoRA
from monai_petl.networks import FPT, ViTClassifier, vit_backbone
from monai_petl.summary import measure_step

CLASSES = 5
EAGER, FUSED = "full fine-tuning, attention written out", "full fine-tuning, fused attention"
LIMITS = {"FPT, resident": 0.13, "FPT, stored": 0.05, "FPT+, resident": 0.12, "FPT+, stored": 0.012}


@dataclass
class Row:
    """A way to train, with what makes its input and what is done once for each image."""

    network: nn.Module
    inputs: Callable[[int], tuple[Tensor, ...]]
    largest: int = 2  # batch at which memory is measured; the rest follows from what another image adds

    def loss(self, batch: int) -> Callable[[], Tensor]:
        inputs, label = self.inputs(batch), torch.zeros(batch, dtype=torch.long)
        return lambda: F.cross_entropy(self.network(*inputs), label)

    def peak(self, batch: int) -> float:
        """Bytes of a step at this batch: measured, or along the line through 1 and the largest that is measured."""
        if batch <= self.largest:
            return measure_step(self.network, self.loss(batch), repeats=1).peak_bytes
        low, high = (measure_step(self.network, self.loss(n), repeats=1).peak_bytes for n in (1, self.largest))
        return low + (high - low) * (batch - 1) / (self.largest - 1)


def main(repeats: int = 3, threads: int = 1, image: int = 512, batch: int = 16, images: int = 1000) -> None:
    """Forward pass, loss, backward pass and AdamW step.

    Args:
        repeats: how often the times are repeated.
        threads: 1 measures processor time, more measure time on the clock.
        image: edge of the image in pixels.
        batch: for the peak of a step.
        images: of an epoch.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    rows = _rows(image, batch)
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        found[name] = {
            "trained": summary(row.network).trainable,
            "kept": measure_step(row.network, row.loss(1), repeats=1).saved_bytes,
            "peak": row.peak(batch),
            "peak_is_measured": batch <= row.largest,
        }
    seconds = interleaved({**{name: _step(row) for name, row in rows.items()}, **_once(rows)}, repeats)
    for name, row in found.items():
        row["seconds"] = seconds[name]
        row["kept_ratio"], row["peak_ratio"] = (row[key] / found[EAGER][key] for key in ("kept", "peak"))
        row["kept_fused"], row["peak_fused"] = (row[key] / found[FUSED][key] for key in ("kept", "peak"))
    floors = {f"{name}, stored": _kept_floor(rows[f"{name}, resident"].network) for name in ("FPT", "FPT+")}
    memory = markdown(
        [
            "",
            "trained",
            "MiB kept an image",
            "of eager",
            "of fused",
            "x floor",
            f"MiB at batch {batch}",
            "of eager",
            "of fused",
        ],
        (
            [
                name,
                f"{row['trained']:,}",
                f"{row['kept'] / 2**20:.1f}",
                f"{row['kept_ratio']:.2%}",
                f"{row['kept_fused']:.2%}",
                f"{row['kept'] / floors[name]:.2f}" if name in floors else "",
                f"{row['peak'] / 2**20:,.0f}",
                f"{row['peak_ratio']:.1%}",
                f"{row['peak_fused']:.1%}",
            ]
            for name, row in found.items()
        ),
    )
    speed = markdown(
        ["", "s an image", f"minutes an epoch of {images}", "x full", "x floor"],
        (
            [
                name,
                f"{median(times):.3f}",
                f"{median(times) * images / 60:.1f}",
                f"{ratio(times, seconds[FUSED]):.3f}",
                f"{ratio(times, seconds[_floor_of(name)]):.2f}" if _floor_of(name) in seconds else "",
            ]
            for name, times in seconds.items()
            if not name.startswith("floor")
        ),
    )
    held = ", ".join(f"{name} {found[name]['peak_ratio']:.1%} (target {limit:.1%})" for name, limit in LIMITS.items())
    reading = (
        f"Peak of a step at batch {batch} against full fine-tuning, attention written out: {held}. Storing the features "
        f"of FPT+ costs as much as {ratio(seconds['storing, FPT+'], seconds[FUSED]):.2f} epochs of full fine-tuning, once; an "
        f"epoch from stored features then takes {ratio(seconds['FPT+, stored'], seconds[FUSED]):.2%} of one, and "
        f"{ratio(seconds['FPT+, resident'], seconds[FUSED]):.0%} without storing."
    )
    report(
        "fine_grained", [memory, speed], reading, {"rows": found, "seconds": seconds, "image": image, "batch": batch}
    )


def _rows(image: int, batch: int) -> dict[str, Row]:
    size = (image, image)

    def large(count: int) -> tuple[Tensor, ...]:
        return (torch.rand(count, 3, *size),)

    def classifier(fused: bool, method: Any, also_train: tuple[str, ...] = ()) -> Row:
        network = ViTClassifier(vit_backbone(3, size, (16, 16)), CLASSES, size, pool="class")
        for block in network.backbone.blocks:
            block.attn.use_flash_attention = fused
        return Row(adapt(network, method, also_train).train(), large)

    rows = {
        EAGER: classifier(False, FullFineTuning()),
        FUSED: classifier(True, FullFineTuning()),
        "LoRA, fused attention": classifier(True, LoRA(), ("head",)),
        "linear probe, fused attention": classifier(True, [], ("head",)),
    }
    for name, variant in (("FPT", "fpt"), ("FPT+", "fpt_plus"), ("side network alone", "side")):
        network = FPT(vit_backbone(3, (384, 384), (16, 16)), CLASSES, size, variant=variant)
        adapt(network, [], also_train=["side"]).train()

        def stored(count: int, network: FPT = network) -> tuple[Tensor, ...]:
            known = () if network.side.fusion is None else range(2)
            states = [torch.rand(count, *network.states_shape()) for _ in known]
            return torch.rand(count, 3, *network.side_size), *states

        if variant == "side":
            rows[name] = Row(network.side, stored, batch)
        else:
            rows |= {f"{name}, stored": Row(network.side, stored, batch), f"{name}, resident": Row(network, large, 2)}
    return rows


def _step(row: Row) -> Callable[[], None]:
    loss, optimizer = row.loss(1), torch.optim.AdamW(trainable_parameters(row.network), lr=0.0)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _once(rows: dict[str, Row]) -> dict[str, Callable[[], object]]:
    """What storing takes, and the side networks by themselves."""
    runs: dict[str, Callable[[], object]] = {}
    for name in ("FPT", "FPT+"):
        row = rows[f"{name}, resident"]
        (large,) = row.inputs(1)
        small = rows[f"{name}, stored"].inputs(1)[0]
        network: Any = row.network
        runs[f"storing, {name}"] = torch.no_grad()(lambda n=network, x=large: n.encode(x))
        blocks = network.side

        def floor(side: Any = blocks, x: Tensor = small) -> None:
            with torch.no_grad():
                for _ in range(3):
                    tokens = side.embed(x)
                    for block in side.blocks:
                        tokens = block(tokens)

        runs[_floor_of(f"{name}, stored")] = floor
    return runs


def _floor_of(name: str) -> str:
    return f"floor: {name}"


def _kept_floor(network: Any) -> int:
    """Bytes of the keys, values and image that come in, and of the inputs of all blocks of the side network."""
    width = network.side.positions.shape[2]
    tokens = network.side.positions.shape[1] + network.side.fusion.prompts.shape[2]
    blocks = len(network.side.blocks) * tokens * width
    return 4 * (2 * math.prod(network.states_shape()) + 3 * math.prod(network.side_size) + blocks)


if __name__ == "__main__":
    fire.Fire(main)
