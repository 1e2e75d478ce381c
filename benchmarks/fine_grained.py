"""What do FPT and FPT+ cost at 512 pixels, against full fine-tuning: activations kept, peak of a step, seconds of an epoch?

With stored features the frozen transformer need not be in memory. Floor of the bytes kept: the stored keys and values and the
image that come in, and what goes into each block of the side network. Floor of a step with stored features: the side network
forward without prompts, and twice that for its backward pass.

    python benchmarks/fine_grained.py
    python benchmarks/fine_grained.py --device cuda
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import fire
import torch
import torch.nn.functional as F
from common import interleaved, markdown, ratio, report
from monai.bundle import ConfigWorkflow
from PIL import Image
from torch import Tensor, nn

from monai_petl import adapt, summary, trainable_parameters
from monai_petl.core.summary import TensorMemory, saved_activation_bytes
from monai_petl.data import preload_states
from monai_petl.methods import FullFineTuning, LoRA
from monai_petl.networks import FPT, ViTClassifier, vit_backbone

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "fpt_vit_classification"
CLASSES = 5
PRELOAD = ("network", "feature_cache", "images", "source_transforms")
METHODS = {"FPT": "fpt", "FPT+": "fpt_plus"}
EAGER, FUSED = "full fine-tuning, attention written out", "full fine-tuning, fused attention"
STORED, RESIDENT, EAGER_SIDE = "{}, stored", "{}, resident", "{}, stored, side attention written out"
EAGER_BATCH = 8  # of EAGER, the largest whose memory a machine of 24 GiB has
LIMITS = {  # MiB kept an image; share of EAGER's; share of EAGER's peak of a step
    STORED.format("FPT"): (57.7, 0.0496, 0.05),
    RESIDENT.format("FPT"): (57.7, 0.0496, 0.13),
    STORED.format("FPT+"): (13.4, 0.0115, 0.012),
    RESIDENT.format("FPT+"): (13.4, 0.0115, 0.12),
}


@dataclass
class Row:
    """A way to train, with what makes its input."""

    network: nn.Module
    inputs: Callable[[int], tuple[Tensor, ...]]

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(trainable_parameters(self.network), lr=0.0)

    def loss(self, inputs: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(self.network(*inputs), torch.zeros_like(inputs[0][:, 0, 0, 0], dtype=torch.long))

    def step(self, inputs: tuple[Tensor, ...]) -> None:
        self.loss(inputs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        _synchronise(inputs[0])

    def kept(self) -> int:
        """Bytes that the backward pass needs of one image."""
        inputs = self.inputs(1)
        return saved_activation_bytes(self.network, lambda: self.loss(inputs))

    def peak(self, batch: int) -> int:
        """Bytes of all tensors of a step at its fullest: weights, gradients, the optimiser's state, input and activations."""
        self.step(self.inputs(1))  # makes the optimiser's state
        if next(self.network.parameters()).is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.step(self.inputs(batch))
            return torch.cuda.max_memory_allocated()
        state = (t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor))
        with TensorMemory((*self.network.parameters(), *self.network.buffers(), *state)) as memory:
            self.step(self.inputs(batch))
        return memory.peak_bytes


def main(
    repeats: int = 3, threads: int = 1, image: int = 512, batch: int = 16, images: int = 1000, device: str = "cpu"
) -> None:
    """Forward pass, loss, backward pass and AdamW step in float32; then epochs as the bundle trains them.

    Args:
        repeats: how often the times are repeated.
        threads: 1 measures processor time, more measure time on the clock.
        image: edge of the image in pixels.
        batch: for the peak of a step.
        images: of an epoch.
        device: ``cpu`` or ``cuda``; on a GPU memory is what its allocator gave out.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads if device == "cpu" else max(threads, 2))  # processor time says nothing of a GPU
    makers = rows_of(image, device)
    rows = {name: memory_of(name, make, batch, device) for name, make in makers.items()}
    for name in METHODS:
        network: Any = makers[RESIDENT.format(name)]().network
        rows[STORED.format(name)]["kept_floor"] = _kept_floor(network)
    seconds = _steps({name: make() for name, make in makers.items()}, repeats)
    epochs = epochs_of(makers[FUSED](), repeats, device, {"img_size": [image, image]})
    record = {"rows": rows, "seconds": seconds, "epochs": epochs, "image": image, "batch": batch, "images": images}
    tables = [memory_table(rows, batch), step_table(seconds), epoch_table(epochs, images)]
    report("fine_grained", tables, reading_of(record), {**record, "device": device})


def rows_of(image: int, device: str) -> dict[str, Callable[[], Row]]:
    """What is compared; each is built when it is called."""
    size = (image, image)

    def classifier(fused: bool, method: Any, also_train: tuple[str, ...] = ()) -> Callable[[], Row]:
        def make() -> Row:
            network = ViTClassifier(vit_backbone(3, size, (16, 16)), CLASSES, size, pool="class")
            for block in network.backbone.blocks:
                block.attn.use_flash_attention = fused
            adapted = adapt(network, method, also_train).to(device).train()
            return Row(adapted, lambda count: (torch.rand(count, 3, *size, device=device),))

        return make

    def side(variant: str, stored: bool, fused: bool = True) -> Callable[[], Row]:
        def make() -> Row:
            network = FPT(vit_backbone(3, (384, 384), (16, 16)), CLASSES, size, variant=variant)
            adapt(network, [], also_train=["side"]).to(device).train()
            if not stored:
                return Row(network, lambda count: (torch.rand(count, 3, *size, device=device),))
            for block in network.side.blocks:
                block.attn.use_flash_attention = fused
            shapes = [(3, *network.side_size)] + [network.states_shape()] * (2 if network.side.fusion else 0)
            return Row(network.side, lambda count: tuple(torch.rand(count, *shape, device=device) for shape in shapes))

        return make

    rows = {
        EAGER: classifier(False, FullFineTuning()),
        FUSED: classifier(True, FullFineTuning()),
        "LoRA, fused attention": classifier(True, LoRA(), ("head",)),
        "linear probe, fused attention": classifier(True, [], ("head",)),
    }
    for name, variant in METHODS.items():
        rows[STORED.format(name)] = side(variant, stored=True)
        rows[EAGER_SIDE.format(name)] = side(variant, stored=True, fused=False)
        rows[RESIDENT.format(name)] = side(variant, stored=False)
    return {**rows, "side network alone": side("side", stored=True)}


def memory_of(name: str, make: Callable[[], Row], batch: int, device: str) -> dict[str, Any]:
    """Bytes, measured at ``measured_at`` images a step; where those are fewer, the rest follows the line through one."""
    row = make()
    most = min(batch, EAGER_BATCH) if name == EAGER and device == "cpu" else batch
    peak = row.peak(most)
    if most < batch:
        peak += (peak - row.peak(1)) * (batch - most) // (most - 1)
    return {"trained": summary(row.network).trainable, "kept": row.kept(), "peak": peak, "measured_at": most}


def memory_table(rows: Mapping[str, Mapping[str, Any]], batch: int) -> str:
    """Of README.md here and of docs/methods/fpt.md."""
    head = ["", "trained", "MiB kept an image", "of eager", "of fused", "x floor"]
    return markdown(
        [*head, f"MiB at batch {batch}", "of eager", "of fused"],
        (
            [
                name,
                f"{row['trained']:,}",
                f"{row['kept'] / 2**20:,.1f}",
                *(f"{row['kept'] / rows[full]['kept']:.2%}" for full in (EAGER, FUSED)),
                f"{row['kept'] / row['kept_floor']:.2f}" if "kept_floor" in row else "",
                f"{row['peak'] / 2**20:,.0f}" + (f" (from {row['measured_at']})" if row["measured_at"] < batch else ""),
                *(f"{row['peak'] / rows[full]['peak']:.1%}" for full in (EAGER, FUSED)),
            ]
            for name, row in rows.items()
        ),
    )


def step_table(seconds: Mapping[str, Sequence[float]]) -> str:
    """Of README.md here."""
    return markdown(
        ["step of one image", "s", "x full", "x floor"],
        (
            [
                name,
                f"{median(times):.3f}",
                f"{ratio(times, seconds[FUSED]):.3f}",
                f"{ratio(times, seconds[_floor_of(name)]):.2f}" if _floor_of(name) in seconds else "",
            ]
            for name, times in seconds.items()
            if not name.startswith("floor")
        ),
    )


def epoch_table(epochs: Mapping[str, Mapping[str, Any]], images: int) -> str:
    """Of README.md here."""
    head = ["epoch", "images timed", "s to read one", "s to learn from or store it", f"minutes for {images}", "x full"]
    full = _seconds_an_image(epochs[FUSED])
    return markdown(
        head,
        (
            [
                name,
                str(row["images"] * len(row["step"])),
                *(f"{median(row[part]) / row['images']:.3f}" if any(row[part]) else "" for part in ("read", "step")),
                f"{median(_seconds_an_image(row)) * images / 60:.1f}",
                f"{ratio(_seconds_an_image(row), full):.3f}",
            ]
            for name, row in epochs.items()
        ),
    )


def reading_of(record: Mapping[str, Any]) -> str:
    """What the tables say, of README.md here."""
    rows, epochs = record["rows"], record["epochs"]
    held = "; ".join(
        f"{name} {rows[name]['peak'] / rows[EAGER]['peak']:.1%} (at most {limit:.1%})"
        for name, (*_, limit) in LIMITS.items()
    )
    full = _seconds_an_image(epochs[FUSED])
    share = {name: ratio(_seconds_an_image(row), full) for name, row in epochs.items()}
    return (
        f"Peak of a step at a batch of {record['batch']} against full fine-tuning with its attention written out: {held}. "
        f"Storing the features of FPT+ takes as long as {share['FPT+, storing']:.2f} epochs of full fine-tuning, once; an "
        f"epoch from the files then takes {share['FPT+, stored']:.1%} of one, and {share['FPT+, resident']:.0%} with the "
        f"transformer in every step."
    ).replace("%", " %")


def _steps(rows: Mapping[str, Row], repeats: int) -> dict[str, list[float]]:
    """Seconds of a step of one image, without reading it, and of the side networks by themselves."""
    inputs = {name: row.inputs(1) for name, row in rows.items()}
    runs: dict[str, Callable[[], object]] = {
        name: lambda r=row, n=name: r.step(inputs[n]) for name, row in rows.items()
    }
    for name in map(STORED.format, METHODS):

        def floor(side: Any = rows[name].network, x: Tensor = inputs[name][0]) -> None:
            with torch.no_grad():
                for _ in range(3):
                    tokens = side.embed(x)
                    for block in side.blocks:
                        tokens = block(tokens)
            _synchronise(x)

        runs[_floor_of(name)] = floor
    return interleaved(runs, repeats)


def epochs_of(full: Row, repeats: int, device: str, ids: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Seconds to read images from files and to learn from them, by the bundle's loaders.

    A turn draws some batches; that of full fine-tuning takes the large images that the transformer of FPT sees. The files have
    just been written, so the system still has them in memory.

    Args:
        full: full fine-tuning.
        repeats: turns.
        device: of the networks.
        ids: other settings of the bundle.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = [f"class {number}" for number in range(CLASSES)]
        ids = {
            "class_names": names,
            "dataset_dir": f"{folder}/images",
            "pretrained_path": None,
            "num_workers": 0,
            **ids,
        }
        ids |= {"device": f"$torch.device('{device}')"}
        for name in names:
            path = Path(folder, "images", "training", name, "image.png")
            path.parent.mkdir(parents=True)
            Image.effect_noise(ids["img_size"], 64).save(path)
        runs: dict[str, Callable[[], object]] = {}
        counts: dict[str, int] = {}

        def add(name: str, parser: Any, learn: Callable[[Mapping[str, Any]], None]) -> None:
            loader, batches = parser.get_parsed_content("train::dataloader"), []
            runs[f"{name}: read"] = lambda: batches.__setitem__(slice(None), loader)
            runs[f"{name}: step"] = lambda: [learn(batch) for batch in batches]
            counts[name] = len(loader) * loader.batch_size

        for name, method in METHODS.items():
            chosen = {**ids, "method": method, "cache_dir": f"{folder}/{method}"}
            preload = _parser(chosen, "preload.json")

            def store(parser: Any = preload, cache_dir: str = chosen["cache_dir"]) -> None:
                shutil.rmtree(cache_dir, ignore_errors=True)
                parts = (parser.get_parsed_content(part) for part in PRELOAD)
                preload_states(*parts, device=parser.get_parsed_content("device"))

            runs[f"{name}, storing: step"], counts[f"{name}, storing"] = store, CLASSES
            stored = _parser({**chosen, "epoch_length": 4})
            add(STORED.format(name), stored, _learner(stored))
            large = _parser({**chosen, "cache_dir": None, "epoch_length": 1, "batch_size": 4})
            add(RESIDENT.format(name), large, _learner(large))
        add(FUSED, large, lambda batch: full.step((batch["source"].as_tensor().to(device),)))
        seconds = interleaved(runs, repeats)
    nothing = [0.0] * repeats
    return {
        name: {"images": count, "read": seconds.get(f"{name}: read", nothing), "step": seconds[f"{name}: step"]}
        for name, count in counts.items()
    }


def _parser(ids: Mapping[str, Any], *also: str) -> Any:
    """A config of the bundle, and its network, of the same random weights each time."""
    workflow = ConfigWorkflow(
        config_file=[str(BUNDLE / "configs" / name) for name in ("train.json", *also)],
        logging_file=False,
        workflow_type="train",
        bundle_root=str(BUNDLE),
        **ids,
    )
    workflow.initialize()
    torch.manual_seed(0)
    workflow.parser.get_parsed_content("adapted_network")
    return workflow.parser


def _learner(parser: Any) -> Callable[[Mapping[str, Any]], None]:
    """A training step as the bundle's trainer makes it."""
    network, loss, optimizer, prepare, device = (
        parser.get_parsed_content(name) for name in ("network", "loss", "optimizer", "train::prepare_batch", "device")
    )
    network.train()

    def learn(batch: Mapping[str, Any]) -> None:
        image, label, _, states = prepare(batch, device)
        loss(network(image, **states), label).backward()
        optimizer.step()
        optimizer.zero_grad()
        _synchronise(image)

    return learn


def _seconds_an_image(row: Mapping[str, Any]) -> list[float]:
    return [(read + step) / row["images"] for read, step in zip(row["read"], row["step"], strict=True)]


def _floor_of(name: str) -> str:
    return f"floor: {name}"


def _kept_floor(network: Any) -> int:
    """Bytes of the keys, values and image that come in, and of the inputs of all blocks of the side network."""
    width = network.side.positions.shape[2]
    tokens = network.side.positions.shape[1] + network.side.fusion.prompts.shape[2]
    blocks = len(network.side.blocks) * tokens * width
    return 4 * (2 * math.prod(network.states_shape()) + 3 * math.prod(network.side_size) + blocks)


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


if __name__ == "__main__":
    fire.Fire(main)
