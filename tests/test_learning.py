"""The main job in small: a network that learnt squares is taught bright spheres by prompt tokens alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_petl import adapt, trainable_parameters
from monai_petl.losses import SampleWeightedFocalLoss
from monai_petl.methods import punet_method
from monai_petl.networks import PUNet
from tests.conftest import state_of

SIZE, BATCH = 32, 8


def scenes(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Images (B, 1, 32, 32, 1) with noise, a dark square and a bright sphere, and the masks of both."""
    axis = torch.arange(SIZE)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")

    def distances() -> tuple[Tensor, Tensor]:
        centre = torch.randint(8, SIZE - 8, (BATCH, 2, 1, 1), generator=generator)
        return (rows - centre[:, 0]).abs(), (columns - centre[:, 1]).abs()

    down, across = distances()
    masks = {"square": (torch.maximum(down, across) <= 5)}
    down, across = distances()
    masks["sphere"] = down**2 + across**2 <= 36
    image = (
        0.3 * torch.randn(BATCH, SIZE, SIZE, generator=generator)
        - masks["square"].float()
        + 2 * masks["sphere"].float()
    )
    return image[:, None, ..., None], {name: mask[:, None, ..., None].long() for name, mask in masks.items()}


def train(network: PUNet, name: str, steps: int, lr: float) -> None:
    generator, loss = torch.Generator().manual_seed(1), SampleWeightedFocalLoss()
    optimiser = torch.optim.AdamW(trainable_parameters(network), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    network.train()
    for _ in range(steps):
        image, masks = scenes(generator)
        optimiser.zero_grad()
        loss(network(image, [name] * BATCH).logits, masks[name]).backward()
        optimiser.step()
        schedule.step()


@torch.no_grad()
def dice(network: PUNet, name: str) -> float:
    network.eval()
    image, masks = scenes(torch.Generator().manual_seed(99))
    found, wanted = network(image, [name] * BATCH).logits.argmax(1, keepdim=True), masks[name]
    return (2 * (found * wanted).sum() / (found.sum() + wanted.sum())).item()


@pytest.mark.slow
def test_prompt_tuning_learns_a_class_on_a_frozen_body_and_full_fine_tuning_is_no_worse():
    pretrained = PUNet(classes=("square",), channels=(16, 16, 24, 24, 32), num_heads=4, tokens_per_class=8)
    train(pretrained, "square", steps=120, lr=5e-3)
    assert dice(pretrained, "square") > 0.8
    scores = {}
    for method, lr in (("prompt", 2e-2), ("full", 5e-3)):
        network = PUNet(classes=("square",), channels=(16, 16, 24, 24, 32), num_heads=4, tokens_per_class=8)
        network.load_state_dict(pretrained.state_dict())
        chosen = punet_method(method, "sphere")
        adapt(network, chosen.methods, chosen.also_train, name="sphere")
        before = state_of(network.body)
        train(network, "sphere", steps=120, lr=lr)
        scores[method] = dice(network, "sphere")
        moved = any(not torch.equal(tensor, before[n]) for n, tensor in network.body.state_dict().items())
        assert moved == (method == "full")
    assert scores["prompt"] > 0.8
    assert scores["full"] > scores["prompt"] - 0.05
