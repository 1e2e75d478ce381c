"""What does EPT cost on top of a frozen ViT-B: the forward pass and a training step, in each of its forms?

The floor is the same transformer without prompts and with fused attention; for a training step it is the same pass back to the
first attention, of one trained factor of every attention in place of the prompts.

    python benchmarks/embedded_prompts.py
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import fire
import torch
import torch.nn.functional as F
from common import interleaved, markdown, ratio, report
from torch import Tensor, nn

from monai_petl import adapt, summary, trainable_parameters
from monai_petl.core.summary import measure_step
from monai_petl.methods import EPT, EPT_FORMS, collapse_prompts
from monai_petl.networks import ViTClassifier, vit_backbone

CLASSES = 3
FUSED, EAGER = "no prompts, fused attention", "no prompts, attention written out"


def main(repeats: int = 7, threads: int = 1, image: int = 224, batch: int = 2, columns: int = 100) -> None:
    """Forward pass in evaluation, and forward pass, loss, backward pass and AdamW step, all in turns.

    Args:
        repeats: how often everything is repeated.
        threads: 1 measures processor time, more measure time on the clock.
        image: edge of the image in pixels.
        batch: images.
        columns: of the literal form; the others have one.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    x, label = torch.rand(batch, 3, image, image), torch.zeros(batch, dtype=torch.long)
    networks = _networks((image, image), columns)
    untouched = {FUSED: _plain((image, image), True), EAGER: _plain((image, image), False)}
    steps = {name: _step(network, x, label) for name, network in networks.items()}
    passes = {name: _pass(network, x) for name, network in {**networks, **untouched}.items()}
    training = interleaved(steps, repeats)
    forward = interleaved(passes, repeats)
    kept = {
        name: measure_step(network.train(), lambda n=network: F.cross_entropy(n(x), label), repeats=1).saved_bytes
        for name, network in networks.items()
    }
    rows = [
        [
            name,
            f"{summary(networks[name]).trainable:,}",
            f"{1e3 * median(forward[name]) / batch:.0f}",
            f"{ratio(forward[name], forward[FUSED]):.3f}",
            f"{1e3 * median(training[name]) / batch:.0f}",
            f"{ratio(training[name], training[FUSED]):.3f}",
            f"{kept[name] / 2**20 / batch:.0f}",
        ]
        for name in networks
    ]
    head = ["", "trained", "ms forward", "x floor", "ms a step", "x floor", "MiB kept an image"]
    over = {
        kind: 100 * (ratio(found["EPT, sink"], found[FUSED]) - 1) for kind, found in (("f", forward), ("t", training))
    }
    reading = (
        f"The fast form adds {over['f']:.1f} % to the forward pass and {over['t']:.1f} % to a training step (target 5 %); "
        f"the published form takes {ratio(forward['EPT, literal'], forward[FUSED]):.2f} and "
        f"{ratio(training['EPT, literal'], training[FUSED]):.2f} times as long as no prompts."
    )
    report(
        "embedded_prompts", [markdown(head, rows)], reading, {"forward": forward, "training": training, "kept": kept}
    )


class Scaled(nn.Module):
    """Attention whose output is multiplied by a trained number: the least that trains in every attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.scale = attention, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.scale * self.attention(x)


def _plain(size: tuple[int, int], fused: bool) -> ViTClassifier:
    network = ViTClassifier(vit_backbone(3, size, (16, 16)), CLASSES, size, pool="class")
    for block in network.backbone.blocks:
        block.attn.use_flash_attention = fused
    return network


def _networks(size: tuple[int, int], columns: int) -> dict[str, nn.Module]:
    networks: dict[str, nn.Module] = {}
    for name, fused in ((FUSED, True), (EAGER, False)):
        network = _plain(size, fused).requires_grad_(False)
        for block in network.backbone.blocks:
            block.attn = Scaled(block.attn)
        network.head.requires_grad_(True)
        networks[name] = network
    for form in EPT_FORMS:
        method = EPT(columns if form == "literal" else 1, form=form)
        networks[f"EPT, {form}"] = adapt(_plain(size, True), method, also_train=["head"])
    networks[f"EPT, literal, {columns} columns collapsed"] = collapse_prompts(
        adapt(_plain(size, True), EPT(columns, form="literal"), also_train=["head"])
    )
    return networks


def _pass(network: nn.Module, x: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        network.eval()(x)

    return run


def _step(network: Any, x: Tensor, label: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(trainable_parameters(network), lr=0.0)

    def run() -> None:
        F.cross_entropy(network.train()(x), label).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


if __name__ == "__main__":
    fire.Fire(main)
