"""Frozen means frozen: what of a network acts otherwise in training, and how it is kept from doing so.

Normalisation layers move their statistics, dropout layers drop. Much else does so without being a layer: drop-connect in
EfficientNet, the codebook of a VQVAE, ``F.dropout(x, p, self.training)`` in a ``forward``. So a module acts in training when
code of its class reads ``self.training``, whatever it is called.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["acts_in_training", "keep_dropout", "keep_frozen"]

FORM_OF_OUTPUT = {  # they read self.training to choose what they return: deep supervision, losses, samples of a latent space
    *("DynUNet", "SegResNetDS", "SegResNetVAE", "MedNeXt", "DAF3D", "VarAutoEncoder", "VarFullyConnectedNet"),
    *("RetinaNetDetector", "GoogLeNet", "Inception3"),
}
NOISE = ("drop", "rand", "bernoulli", "noise", "jitter", "stochastic")  # in names that code uses beside self.training
TORCH_CONTAINERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)  # they read it to choose a fused kernel


def acts_in_training(module: nn.Module) -> bool:
    """Whether a module computes otherwise, or changes itself, under ``train()``, by code of its own class.

    A network at the top, or one of those that are known for it, may read ``self.training`` to choose what it returns, such as
    the outputs of deep supervision. It counts when the code also names some noise, such as ``F.dropout``. A module with
    ``follows_training = True`` follows ``train()`` in any case.
    """
    return _acts(module, inner=True)


def keep_frozen(network: nn.Module) -> None:
    """Pin what acts in training and is frozen to evaluation mode; release what trains.

    A module counts as trained when all its parameters are. One without parameters (dropout, drop-path, normalisation without
    scale) goes with the nearest module around it that has some: it is live when all of them train.
    """

    def visit(module: nn.Module, outer_trains: bool) -> None:
        inside = [p for n, p in module.named_parameters() if "deltas" not in n.split(".")]
        trains = all(p.requires_grad for p in inside) if inside else outer_trains
        if _acts(module, inner=module is not network):
            if trains or module.__dict__.get("_kept_live"):
                module.__dict__.pop("train", None)
                module.train(network.training)
            else:
                module.__dict__["train"] = functools.partial(_stay_in_evaluation, module)
                module.train()
        if isinstance(module, nn.TransformerEncoderLayer) and any("deltas" in n for n, _ in module.named_parameters()):
            module.activation_relu_or_gelu = 0  # torch's fused kernel reads weights alone, and would leave adapters out
        for child in module.children():
            visit(child, trains)

    visit(network, True)


def keep_dropout(network: nn.Module, probability: float) -> None:
    """Give all dropout layers this probability, and let them follow ``network.train()`` though the layers around are frozen.

    Raises:
        ValueError: it is not in 0 ... 1.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"dropout is a probability from 0 to 1, got {probability}")
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = probability
            module.__dict__["_kept_live"] = True  # for keep_frozen, when adapters come or go
            module.__dict__.pop("train", None)
            module.train(network.training)


def _acts(module: nn.Module, inner: bool) -> bool:
    if getattr(module, "follows_training", False) or getattr(module, "gradient_checkpointing", False):
        return False
    kind: Any = type(module)
    if isinstance(module, TORCH_CONTAINERS) or (isinstance(module, nn.RNNBase) and not module.dropout):
        return False
    if any(base.__name__ in FORM_OF_OUTPUT for base in kind.__mro__):
        return False
    return _reads_training(kind, not inner)


@functools.cache
def _reads_training(kind: Any, noise_alone: bool) -> bool:
    """Whether a method of the class, or of one above it, reads ``self.training``; beside some noise, if that alone counts."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for member in vars(base).values():
            function = getattr(member, "__wrapped__", member)
            for code in _codes(getattr(function, "__code__", None)):
                if _reads_own(code) and (not noise_alone or _names_noise(code)):
                    return True
    return False


def _codes(code: types.CodeType | None) -> Iterator[types.CodeType]:
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from _codes(constant)


def _reads_own(code: types.CodeType) -> bool:
    """Whether code reads ``self.training``, and not that of another module."""
    if "training" not in code.co_names:
        return False
    before = None
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_ATTR" and step.argval == "training" and before is not None:
            loaded = before.argval[-1] if isinstance(before.argval, tuple) else before.argval
            if loaded == "self":
                return True
        before = step
    return False


def _names_noise(code: types.CodeType) -> bool:
    return any(word in name.lower() for name in (*code.co_names, *code.co_varnames) for word in NOISE)


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    module.training = False
    for child in module.children():  # such as what a method added to it
        child.train(mode)
    return module
