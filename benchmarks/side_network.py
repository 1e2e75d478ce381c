"""What does a training step of SAN cost, against full fine-tuning of the same transformer: time, activations kept, peak?

The transformer under full fine-tuning has the decoder of ``ViTSegmenter``. Floor of the time: what has to be computed at least,
measured by itself: the frozen transformer forward without its last block, and the side network forward, and twice that for
its backward pass. Floor of the bytes kept, with recomputation: what goes into each block of the side network, and the logits
at the image's resolution.

    python benchmarks/side_network.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import fire
import torch
from common import interleaved, markdown, ratio, report
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor, nn

from monai_petl import adapt, summary, trainable_parameters
from monai_petl.core.summary import measure_step
from monai_petl.methods import FullFineTuning
from monai_petl.networks import SAN, ViTSegmenter, vit_backbone

CLASSES = 5
FULL = "full fine-tuning"
VARIANTS: dict[str, dict[str, Any]] = {
    "SAN": {},
    "deep supervision": {"deep_supervision": True},
    "without recognition": {"recognition": False},
    "without recomputation": {"use_checkpoint": False},
    "masks at the side grid": {"pixel_upsample": 0},
}


def main(repeats: int = 3, threads: int = 1, volume: int = 96, image: int = 512) -> None:
    """Forward pass, loss, backward pass and AdamW step, of all in turns.

    Args:
        repeats: how often everything is repeated.
        threads: 1 measures processor time, more measure time on the clock.
        volume: edge of the volume in voxels.
        image: edge of the image in pixels.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    tables, record, readings = [], {}, []
    for size, patch in (((volume,) * 3, (16, 16, 16)), ((image,) * 2, (16, 16))):
        title = f"ViT-B, patches of 16, one {'volume' if len(size) == 3 else 'image'} of {' x '.join(map(str, size))}"
        found = _measure(size, patch, repeats)
        record[title] = found
        rows = [
            [
                name,
                f"{row['trained']:,}",
                f"{median(row['seconds']):.2f}",
                f"{row['time_ratio']:.2f}",
                f"{row['over_floor']:.2f}" if row["over_floor"] else "",
                f"{row['kept'] / 2**20:.0f}",
                f"{row['kept_ratio']:.2f}",
                f"{row['kept_over_floor']:.2f}" if row["kept_over_floor"] else "",
                f"{row['peak_ratio']:.2f}",
            ]
            for name, row in found.items()
        ]
        head = ["", "trained", "s a step", "x full", "x floor", "MiB kept", "x full", "x floor", "peak x full"]
        tables.append(f"{title}:\n\n{markdown(head, rows)}")
        time, kept, peak = (100 * found["SAN"][f"{name}_ratio"] for name in ("time", "kept", "peak"))
        readings.append(
            f"{title}: a step of SAN takes {time:.0f} % of the time of full fine-tuning, keeps {kept:.0f} % of its activations "
            f"(the target is 35 %), and its peak is {peak:.0f} %"
        )
    report("side_network", tables, "; ".join(readings) + ".", record)


def _measure(size: Sequence[int], patch: Sequence[int], repeats: int) -> dict[str, dict[str, Any]]:
    image, label = torch.rand(1, 1, *size), torch.randint(0, CLASSES, (1, 1, *size))
    criterion = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    networks: dict[str, nn.Module] = {
        FULL: adapt(ViTSegmenter(vit_backbone(1, size, patch), CLASSES, size), FullFineTuning())
    }
    for name, options in VARIANTS.items():
        networks[name] = adapt(SAN(vit_backbone(1, size, patch), CLASSES, size, **options), [], also_train=["side"])
    steps = {name: _step(network.train(), image, label, criterion) for name, network in networks.items()}
    seconds = interleaved({**steps, **_floor_runs(networks["without recomputation"], image)}, repeats)
    floor = [
        stream + 3 * side for stream, side in zip(seconds.pop("floor: stream"), seconds.pop("floor: side"), strict=True)
    ]
    found: dict[str, dict[str, Any]] = {}
    for name, network in networks.items():
        cost = measure_step(network, lambda network=network: criterion(network(image), label), repeats=1)
        found[name] = {
            "trained": summary(network).trainable,
            "seconds": seconds[name],
            "time_ratio": ratio(seconds[name], seconds[FULL]),
            "over_floor": ratio(seconds[name], floor) if name == "SAN" else None,
            "kept": cost.saved_bytes,
            "peak": cost.peak_bytes,
            "kept_over_floor": cost.saved_bytes / _kept_floor(network, image) if name == "SAN" else None,
        }
    for row in found.values():
        row["kept_ratio"] = row["kept"] / found[FULL]["kept"]
        row["peak_ratio"] = row["peak"] / found[FULL]["peak"]
    return found


def _step(network: nn.Module, image: Tensor, label: Tensor, criterion: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(trainable_parameters(network), lr=0.0)

    def run() -> None:
        criterion(network(image), label).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _floor_runs(network: SAN, image: Tensor) -> dict[str, Callable[[], object]]:
    """The frozen transformer without its last block, and the side network, forward."""
    states, _, _ = network.states(image)
    quarter = len(network.backbone.blocks) // 4

    @torch.no_grad()
    def stream() -> None:
        _, x, _ = network.states(image)
        for block in network.backbone.blocks[-quarter:-1]:
            x = block(x)

    @torch.no_grad()
    def side() -> None:
        network.side(image, states)

    return {"floor: stream": stream, "floor: side": side}


def _kept_floor(network: SAN, image: Tensor) -> int:
    """Bytes of the inputs of all blocks of the side network, and of the logits."""
    patches = network.side.positions.shape[1]
    width = network.side.positions.shape[2]
    blocks = len(network.side.blocks) * (patches + network.side.num_queries) * width
    return 4 * (blocks + CLASSES * image.numel())


if __name__ == "__main__":
    fire.Fire(main)
