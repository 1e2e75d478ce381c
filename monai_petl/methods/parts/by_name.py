"""Every method under one name, so that a config switches among them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from monai_petl.core.adapt import adapt
from monai_petl.core.deltas import deltas_of
from monai_petl.core.frozen import keep_dropout
from monai_petl.core.method import Method
from monai_petl.core.roles import matches
from monai_petl.core.summary import summary
from monai_petl.methods.aim import AIM
from monai_petl.methods.ept import EPT
from monai_petl.methods.ffn_adapter import FFNAdapter
from monai_petl.methods.lora import LoRA
from monai_petl.methods.ssf import SSF
from monai_petl.methods.subsets import BiasOnly, FullFineTuning, LastBlocks, NormOnly
from monai_petl.methods.vpetl import VPETL
from monai_petl.methods.vpt import VPT

__all__ = ["METHODS", "adapt_by_name", "method_by_name", "parameter_groups"]

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)

METHODS: dict[str, tuple[str, Callable[..., Method] | None]] = {
    "lora": ("low-rank factors beside q and v, or beside convolutions", LoRA),
    "vpetl": ("parallel attention and FFN adapters", VPETL),
    "aim": ("spatial, temporal and joint adapters, for slices of a volume", AIM),
    "ffn_adapter": ("bottleneck adapters beside the MLPs (AdaptFormer)", FFNAdapter),
    "vpt": ("prompt tokens at every block", VPT),
    "ept": ("a learned gate on attention, place by place", EPT),
    "ssf": ("a scale and a shift behind every layer", SSF),
    "bias": ("all biases (BitFit)", BiasOnly),
    "norm": ("scale and shift of all norms", NormOnly),
    "last_blocks": ("the last transformer block", LastBlocks),
    "head": ("the head alone, on the frozen backbone", None),
    "full": ("everything, from the pre-trained backbone", FullFineTuning),
    "scratch": ("everything, from random weights", FullFineTuning),
}


def method_by_name(name: str, options: Mapping[str, Any] | None = None) -> Method | None:
    """The method of this name; nothing for ``head``, which trains what ``also_train`` names alone.

    Args:
        name: a key of :data:`METHODS`.
        options: arguments of the method, such as ``{"rank": 4}``.

    Raises:
        ValueError: there is no such method, or it has no such argument.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    make = METHODS[name][1]
    if make is None:
        if options:
            raise ValueError(f"the method {name} has no options, got {dict(options)}")
        return None
    try:
        return make(**(options or {}))
    except TypeError as error:
        raise ValueError(f"method_options {dict(options or {})} do not fit the method {name}: {error}") from error


def adapt_by_name(
    network: Network,
    method: str,
    also_train: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    dropout: float | None = None,
) -> Network:
    """Freeze a network, attach the method of this name, and let the head train besides.

    Args:
        network: changed in place.
        method: a key of :data:`METHODS`.
        also_train: names or patterns of the head, which trains with every method.
        options: arguments of the method.
        dropout: probability of all its dropout layers in training mode, also of those in the frozen part, which are off
            otherwise: for uncertainty by repeated predictions (Monte Carlo dropout), as MONAI Label's scoring makes them.

    Returns:
        The same network; its adapter is called after the method.

    Raises:
        TypeError, ValueError: see :func:`monai_petl.adapt` and :func:`method_by_name`.
    """
    chosen = method_by_name(method, options)
    whole = isinstance(chosen, FullFineTuning)
    adapt(network, [] if chosen is None else chosen, () if whole else also_train, name=method)
    if dropout is not None:
        keep_dropout(network, dropout)
    logger.info("%s:\n%s", method, summary(network))
    return network


def parameter_groups(
    network: nn.Module, head: Sequence[str], lr: float, delta_lr: float, backbone_lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What an optimiser gets, in three groups: the head, deltas, and tensors of the backbone that train.

    Args:
        network: an adapted network.
        head: names or patterns of the head.
        lr: of the head.
        delta_lr: of the method's deltas. They have no weight decay, which would pull the network back to the backbone.
        backbone_lr: of the backbone's own tensors.
        weight_decay: of the head and the backbone.

    Returns:
        The head, the deltas, the backbone; some may be empty.
    """
    deltas = {id(p) for _, delta in deltas_of(network) for p in delta.parameters()}
    groups: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            in_head = any(matches(name, pattern) for pattern in head)
            groups[1 if id(parameter) in deltas else 0 if in_head else 2].append(parameter)
    return [
        {"params": groups[0], "lr": lr, "weight_decay": weight_decay},
        {"params": groups[1], "lr": delta_lr, "weight_decay": 0.0},
        {"params": groups[2], "lr": backbone_lr, "weight_decay": weight_decay},
    ]
