"""What the tests share: fixed seeds, a small PUNet, and a small additive method to try the machinery of adapters on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from monai_petl import Method, trainable_parameters
from monai_petl.__main__ import main
from monai_petl.networks import PUNet

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("tests")

Run = Callable[..., str]  # of the command line


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def small_punet(*classes: str, **options: Any) -> PUNet:
    """A PUNet of five narrow levels with running statistics as after some training."""
    defaults: dict[str, Any] = {"channels": (8, 8, 16, 16, 24), "num_heads": 4, "tokens_per_class": 4}
    return shake_statistics(PUNet(classes=classes, **{**defaults, **options}))


def shake_statistics(network: Any) -> Any:
    """Give every batch norm running statistics and scales other than the initial ones."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, 0, 0.2)
    return network


def train(network: nn.Module, loss: Callable[[], Tensor], steps: int = 3, **options: Any) -> None:
    """A few large steps of AdamW under ``network.train()``."""
    network.train()
    optimiser = torch.optim.AdamW(trainable_parameters(network), **{"lr": 1e-2, **options})
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


def train_class(network: PUNet, name: str, image: Tensor, **options: Any) -> None:
    """Train whatever trains on an arbitrary target for one class."""
    target = (image[:, 0] > 0.3).long()
    names = [name] * len(image)
    train(network, lambda: nn.functional.cross_entropy(network(image, names).logits, target), **options)


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Without gradients and with all parameters frozen: torch chooses kernels by what requires a gradient, so that
    networks of the same bits otherwise agree to rounding only."""
    flags = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    with torch.no_grad():
        yield
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict: parameters and running statistics."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors of ``before`` that are not there any more, bit for bit."""
    return {name for name, tensor in before.items() if name not in after or not torch.equal(tensor, after[name])}


class RankOneDelta(nn.Module):
    """The tensors of :class:`RankOne` for one linear layer; ``up`` starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.live = True
        self.base: Tensor | None = None  # the weight from before merging

    def weight(self) -> Tensor:
        return self.up @ self.down


def _add_delta(linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    delta = linear.delta
    return output + inputs[0] @ delta.weight().T if delta.live and delta.base is None else output


@dataclass(frozen=True)
class RankOne(Method):
    """W x + up (down x) on every linear layer whose name ends as given; starts as the identity."""

    target: str = "linear"
    rank: int = 1

    def attach(self, network: nn.Module, name: str) -> None:
        for linear in self._linears(network):
            linear.delta = RankOneDelta(linear, self.rank)
            linear.delta_hook = linear.register_forward_hook(_add_delta)

    def detach(self, network: nn.Module, name: str) -> None:
        for linear in self._linears(network):
            linear.delta_hook.remove()
            del linear.delta, linear.delta_hook

    def set_enabled(self, network: nn.Module, name: str, enabled: bool) -> None:
        for linear in self._linears(network):
            linear.delta.live = enabled

    @torch.no_grad()
    def merge(self, network: nn.Module, name: str) -> None:
        for linear in self._linears(network):
            linear.delta.base = linear.weight.clone()
            linear.weight += linear.delta.weight()

    @torch.no_grad()
    def unmerge(self, network: nn.Module, name: str) -> None:
        for linear in self._linears(network):
            linear.weight.copy_(linear.delta.base)
            linear.delta.base = None

    def _linears(self, network: nn.Module) -> list[nn.Linear]:
        linears = [m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.endswith(self.target)]
        if not linears:
            raise ValueError(f"no linear layer is called {self.target!r}")
        return linears


class SmallNet(nn.Module):
    """A backbone with everything that must be kept still: running statistics, dropout, and a layer to adapt."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5))
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.linear(self.stem(x).mean((2, 3)))))


@pytest.fixture
def small_net() -> SmallNet:
    return shake_statistics(SmallNet())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``python -m monai_petl`` with arguments; returns what it prints, or raises SystemExit."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["monai_petl", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return call


def error_of(run: Run, *arguments: object) -> str:
    """The sentence with which a command fails; Python ends with exit code 1 when given one."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert isinstance(stop.value.code, str)
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code
