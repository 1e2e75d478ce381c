"""What does a training step of each method cost, against full fine-tuning: time and activations kept for the backward pass?

Floor of a method whose delta reaches down to the first block: the forward pass, the gradient of every activation down to where
the first trained tensor stands, and the head's own gradients. It is measured on the frozen network with a gradient asked for at
its embedding, or, for FFN adapters, in front of its first MLP ("propagation" in the tables). Floor of those that train the end
alone: the same without the transformer's backward pass, which is training the head alone.

    python benchmarks/methods.py
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import fire
import torch
import torch.nn.functional as F
from common import interleaved, markdown, ratio, report
from monai.networks.nets import SwinUNETR, ViT
from torch import Tensor, nn

from monai_petl import Method, adapt, summary, trainable_parameters
from monai_petl.core.summary import saved_activation_bytes
from monai_petl.methods import (
    AIM,
    SSF,
    VPETL,
    VPT,
    BiasOnly,
    FFNAdapter,
    FullFineTuning,
    HeadOnly,
    LastBlocks,
    LoRA,
    NormOnly,
)
from monai_petl.networks import AIMViT

METHODS: dict[str, Method] = {
    "full fine-tuning": FullFineTuning(),
    "LoRA": LoRA(),
    "VPETL": VPETL(),
    "FFNAdapter": FFNAdapter(),
    "VPT": VPT(),
    "SSF": SSF(),
    "BiasOnly": BiasOnly(),
    "NormOnly": NormOnly(),
    "LastBlocks(2)": LastBlocks(2),
    "HeadOnly": HeadOnly(),
}
SLICE_METHODS: dict[str, Method] = {
    "full fine-tuning": FullFineTuning(),
    "AIM": AIM(),
    "AIM(temporal=False)": AIM(temporal=False),
    "LoRA": LoRA(),
    "HeadOnly": HeadOnly(),
}
FULL, HEAD, PROPAGATION, FROM_MLP = "full fine-tuning", "HeadOnly", "propagation", "propagation, first MLP"
FLOORS = {"LastBlocks(2)": HEAD, HEAD: HEAD, "FFNAdapter": FROM_MLP, FROM_MLP: FROM_MLP}  # of all others: PROPAGATION


@dataclass(frozen=True)
class Task:
    """A network, a batch for it, and what every method trains besides."""

    title: str
    network: nn.Module
    image: Tensor
    label: Tensor
    head: Sequence[str]
    embedding: str
    first_mlp: str
    methods: Mapping[str, Method]

    def loss(self, network: nn.Module) -> Tensor:
        scores = network(self.image)
        return F.cross_entropy(scores[0] if isinstance(scores, tuple) else scores, self.label)


def classification(size: int, batch_size: int) -> Task:
    image, label = torch.randn(batch_size, 3, size, size), torch.randint(0, 2, (batch_size,))
    title = f"ViT-B, {batch_size} images of 3 x {size} x {size}, classification"
    head, first = ["classification_head"], "blocks.0.norm2"
    return Task(title, _vit(size), image, label, head, "patch_embedding", first, METHODS)


def slices(size: int, count: int) -> Task:
    """Each slice is classified; all but AIM with its temporal adapters see it by itself."""
    image, label = torch.randn(1, 3, size, size, count), torch.randint(0, 2, (count,))
    title = f"ViT-B over a volume of {count} slices of 3 x {size} x {size}, classification of slices"
    head, first = ["classification_head"], "blocks.0.norm2"
    return Task(title, AIMViT(_vit(size)), image, label, head, "patch_embedding", first, SLICE_METHODS)


def segmentation(size: int) -> Task:
    image, label = torch.randn(1, 1, size, size, size), torch.randint(0, 2, (1, size, size, size))
    title = f"SwinUNETR of feature size 24, one volume of {size}^3; decoder and head train with every method"
    network = SwinUNETR(1, 2, feature_size=24)
    first = "swinViT.layers1.0.blocks.0.norm2"
    return Task(title, network, image, label, ["encoder*", "decoder*", "out"], "swinViT.patch_embed", first, METHODS)


def _vit(size: int) -> ViT:
    return ViT(
        3,
        (size, size),
        (16, 16),
        spatial_dims=2,
        classification=True,
        num_classes=2,
        qkv_bias=True,
        post_activation=None,
    )


def main(
    repeats: int = 3, threads: int = 1, size: int = 224, batch_size: int = 2, depth: int = 8, volume: int = 96
) -> None:
    """Forward pass, loss, backward pass and AdamW step, of every method in turns.

    Args:
        repeats: how often everything is repeated.
        threads: 1 measures processor time, more measure time on the clock.
        size: edge of an image in pixels.
        batch_size: images a step.
        depth: slices of the volume that AIM takes.
        volume: edge of a volume in voxels.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    tables, record, readings = [], {}, []
    tasks = {"vit": classification(size, batch_size), "slices": slices(size, depth), "swin_unetr": segmentation(volume)}
    for key, task in tasks.items():
        table, found = _measure(task, repeats)
        tables.append(f"{task.title}:\n\n{table}")
        record[key] = found
        deltas = [m for m in task.methods if m != FULL and FLOORS.get(m) != HEAD]
        times, kept = found["time_ratio"], found["kept_ratio"]
        readings.append(
            f"{type(task.network).__name__}: methods that reach the first block take {_range(times, deltas)} of the time of "
            f"full fine-tuning (propagation alone {times[PROPAGATION]:.2f}) and keep {_range(kept, deltas)} of its activations "
            f"(propagation alone {kept[PROPAGATION]:.2f}); the head alone takes {times[HEAD]:.2f} and keeps {kept[HEAD]:.2f}."
        )
    report("methods", tables, " ".join(readings), {"repeats": repeats, **record})


def _measure(task: Task, repeats: int) -> tuple[str, dict[str, object]]:
    networks = {name: _adapted(task, method) for name, method in task.methods.items()}
    for name, start in ((PROPAGATION, task.embedding), (FROM_MLP, task.first_mlp)):
        networks[name] = _adapted(task, [])
        networks[name].get_submodule(start).register_forward_hook(lambda m, i, y: y.requires_grad_())
    optimizers = {name: torch.optim.AdamW(trainable_parameters(n), lr=0.0) for name, n in networks.items()}

    def step(name: str) -> None:
        task.loss(networks[name]).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    kept = {name: saved_activation_bytes(n, lambda n=n: task.loss(n)) for name, n in networks.items()}
    seconds = interleaved({name: (lambda name=name: step(name)) for name in networks}, repeats)
    times = {name: ratio(s, seconds[FULL]) for name, s in seconds.items()}
    rows = []
    for name, network in networks.items():
        floor = FLOORS.get(name, PROPAGATION)
        rows.append(
            (
                name,
                f"{summary(network).trainable:,}",
                f"{min(seconds[name]):.2f}",
                f"{times[name]:.2f}",
                f"{ratio(seconds[name], seconds[floor]):.2f}",
                f"{kept[name] / 1e6:.0f}",
                f"{kept[name] / kept[FULL]:.2f}",
                f"{kept[name] / kept[floor]:.2f}",
            )
        )
    header = ("method", "trained", "s a step", "x full", "x floor", "MB kept", "x full", "x floor")
    return markdown(header, rows), {
        "seconds": seconds,
        "kept_bytes": kept,
        "time_ratio": times,
        "kept_ratio": {name: value / kept[FULL] for name, value in kept.items()},
    }


def _adapted(task: Task, method: Method | list[Method]) -> nn.Module:
    """A copy in training mode that shares its values (not what trains) with the others; steps of rate 0 leave them alone."""
    network = copy.deepcopy(task.network)
    for own, shared in zip(network.parameters(), task.network.parameters(), strict=True):
        own.data = shared.data
    return adapt(network, method, () if isinstance(method, FullFineTuning) else task.head).train()


def _range(ratios: dict[str, float], names: list[str]) -> str:
    return f"{min(ratios[n] for n in names):.2f} to {max(ratios[n] for n in names):.2f}"


if __name__ == "__main__":
    fire.Fire(main)
