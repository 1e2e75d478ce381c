"""The one verb: freeze a network and attach a trained delta to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase

import torch
from torch import nn

from monai_petl.core.deltas import Delta, deltas_of, remove_deltas
from monai_petl.core.frozen import acts_in_training, keep_frozen
from monai_petl.core.method import Method, kinds
from monai_petl.core.records import (
    AdapterRecord,
    adapter_module_names,
    adapters_of,
    named_tensors,
    refuse_merged,
    refuse_shared,
)
from monai_petl.core.wrappers import refuse_wrappers, unwrapped

__all__ = ["adapt", "attach", "restored_on_error", "trainable_parameters"]


def adapt(
    network: nn.Module, method: Method | Sequence[Method], also_train: Sequence[str] = (), name: str = "default"
) -> nn.Module:
    """Freeze ``network``, attach one or several methods, and unfreeze what is named besides.

    Frozen means frozen: normalisation layers whose parameters do not train keep their running statistics, and dropout of
    the frozen part stays off, under ``network.train()`` too.

    Args:
        network: any network that the methods can handle; changed in place, its class and ``forward`` stay. One that is
            compiled or in ``DataParallel`` is adapted inside.
        method: a method or several.
        also_train: names or glob patterns of modules or parameters that train as they are, for instance ``"out"`` or
            ``"decoder*.norm"``.
        name: the adapter's name on this network, under which it is saved, switched and removed.

    Returns:
        The same network.

    Raises:
        ValueError: the name is taken, a pattern matches nothing, another adapter trains the same backbone tensor, or the
            network is wrapped in ``DistributedDataParallel`` already.
        TypeError: a method cannot handle the network.
    """
    refuse_wrappers(network)
    plain = unwrapped(network)
    with restored_on_error(plain):
        plain.requires_grad_(False)
        attach(plain, [method] if isinstance(method, Method) else list(method), also_train, name)
    return network


def attach(
    network: nn.Module,
    methods: Sequence[Method],
    also_train: Sequence[str],
    name: str,
    fill: Callable[[AdapterRecord], None] = lambda record: None,
) -> AdapterRecord:
    """Attach methods beside what is there and record them under ``name``; the rest of :func:`adapt` is freezing.

    Args:
        fill: gives the new tensors their values; after an error in it, as after any other, nothing is attached.
    """
    records = adapters_of(network)
    refuse_merged(network)
    if name in records:
        raise ValueError(
            f"the network has an adapter {name!r} already ({kinds(records[name].methods)}); to attach {kinds(methods)}, remove "
            f"that with remove_adapter(network, {name!r}), or choose another name"
        )
    if isinstance(also_train, str):
        raise ValueError(f"also_train must be a list of names or patterns, got the string {also_train!r}")
    training = [p for p in network.parameters() if p.requires_grad]
    before = {n: t.detach() for n, t in named_tensors(network)}
    attached: list[Method] = []
    _set_requires_grad(training, False)
    try:
        for method in methods:
            method.attach(network, name)
            attached.append(method)
        for pattern in also_train:
            _set_requires_grad(_matching(network, pattern), True)
        for layer, delta in deltas_of(network, name):
            if delta.replacement is not None:  # what it stands in for would never get a gradient
                layer.requires_grad_(False)
                delta.requires_grad_(True)
        keep_frozen(network)
        record = AdapterRecord(list(methods), tuple(also_train), _names_of_adapter(network, name))
        owned = adapter_module_names(network)
        originals = [n for n in record.tensors if n in before and not n.startswith(owned)]
        refuse_shared(network, originals)
        record.originals = {n: (before[n] if before[n].is_meta else before[n].cpu()).clone() for n in originals}
        fill(record)
        records[name] = record
    except Exception:
        for method in reversed(attached):
            with suppress(TypeError):  # a method that cannot be taken away must not hide the error
                method.detach(network, name)
        remove_deltas(network, name)
        raise
    finally:
        _set_requires_grad(training, True)
        keep_frozen(network)
    return record


@contextmanager
def restored_on_error(network: nn.Module) -> Iterator[None]:
    """When the block fails, parameters train and modules are in training mode exactly where they did before it."""
    flags = [(p, p.requires_grad) for p in network.parameters()]
    modes = [(m, m.training, m.__dict__.get("train")) for m in network.modules()]
    try:
        yield
    except Exception:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training, pinned in modes:
            module.__dict__.pop("train", None)
            if pinned is not None:
                module.__dict__["train"] = pinned
            module.training = training
        raise


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What an optimiser gets: the parameters that train.

    Raises:
        ValueError: nothing trains.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of this network trains; call adapt(network, method) first")
    return parameters


def _set_requires_grad(parameters: Iterable[nn.Parameter], flag: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(flag)


def _matching(network: nn.Module, pattern: str) -> list[nn.Parameter]:
    """Parameters whose own name, or the name of a module around them, matches the pattern."""
    found = [
        parameter
        for name, parameter in network.named_parameters()
        if "deltas" not in name.split(".") and any(fnmatchcase(part, pattern) for part in _prefixes(name))
    ]
    if not found:
        modules = ", ".join(n for n, _ in network.named_children())
        raise ValueError(
            f"also_train: nothing in the network is called {pattern!r}; its top-level modules are: {modules}"
        )
    return found


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


@torch.no_grad()
def _names_of_adapter(network: nn.Module, adapter: str) -> list[str]:
    """State-dict names of what trains now (parameters, and statistics of normalisation layers that train) and of the deltas."""
    names = {n for n, p in network.named_parameters() if p.requires_grad}
    for prefix, module in network.named_modules():
        if isinstance(module, Delta) and module.adapter == adapter:
            names |= {f"{prefix}.{n}" for n in module.state_dict()}
        if acts_in_training(module) and "train" not in module.__dict__:
            names |= {f"{prefix}.{n}" for n, _ in module.named_buffers(recurse=False)}
    return [n for n, _ in named_tensors(network) if n in names]
