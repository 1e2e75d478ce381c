"""What adapters contribute: switch them on and off, fold them into the weights, take them away.

Tensors of the backbone that an adapter trains have one value at a time; the others are kept aside in its record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from monai_petl.core.deltas import (
    deltas_of,
    install_replacements,
    merge_deltas,
    remove_deltas,
    require_backups,
    set_deltas_enabled,
    unmerge_deltas,
)
from monai_petl.core.frozen import keep_frozen
from monai_petl.core.method import Method
from monai_petl.core.records import (
    AdapterRecord,
    adapters_of,
    find_record,
    named_tensors,
    refuse_merged,
    refuse_shared,
    refuse_two_heads,
)
from monai_petl.core.wrappers import on_plain, unwrapped

__all__ = [
    "activate",
    "backbone_loaded",
    "disabled",
    "merge",
    "merge_and_unload",
    "remove_adapter",
    "unmerge",
]


@on_plain
def remove_adapter(network: nn.Module, name: str | None = None) -> None:
    """Take an adapter away; backbone tensors that it trained get back their values from before."""
    name, record = find_record(network, name)
    with _unmerged(network):
        if record.enabled:
            _exchange(network, record)
        for method in reversed(record.methods):
            method.detach(network, name)
        remove_deltas(network, name)
        records = adapters_of(network)
        del records[name]
        others = {n for other in records.values() for n in other.originals}
        for n, tensor in named_tensors(network):
            if n in record.originals and n not in others:
                tensor.requires_grad_(False)
    keep_frozen(network)


@on_plain
def merge(network: nn.Module, name: str | None = None, keep_backup: bool = True) -> nn.Module:
    """Fold an adapter into the backbone's weights, so that inference costs what the backbone costs.

    Args:
        network: changed in place.
        name: which adapter; default the one attached last.
        keep_backup: keep the weights from before, so that :func:`unmerge` restores them bit for bit.

    Raises:
        TypeError: the method cannot be merged.
        ValueError: it is merged already, is switched off, or another adapter comes before it at some layer.

    Train before merging: :func:`unmerge` puts the weights from before back, and what was trained since is lost.
    """
    name, record = find_record(network, name)
    if record.merged:
        raise ValueError(f"adapter {name!r} is merged already; call unmerge(network, {name!r}) to undo that")
    if not record.enabled:
        raise ValueError(f"adapter {name!r} is switched off; call activate(network, {name!r}) first")
    merged: list[Method] = []
    try:
        for method in record.methods:
            method.merge(network, name)
            merged.append(method)
        merge_deltas(network, name, keep_backup)
    except Exception:
        for method in reversed(merged):
            method.unmerge(network, name)
        raise
    record.merged = 1 + max(other.merged for other in adapters_of(network).values())
    return network


@on_plain
def unmerge(network: nn.Module, name: str | None = None) -> nn.Module:
    """Undo :func:`merge`, bit for bit.

    Raises:
        ValueError: the adapter is not merged, was merged without a backup, or another one was merged on top.
    """
    name, record = find_record(network, name)
    if not record.merged:
        raise ValueError(f"adapter {name!r} is not merged")
    last = _merged(network)[-1]
    if last != name:
        raise ValueError(f"adapter {last!r} was merged after {name!r}; unmerge it first")
    unmerge_deltas(network, name)
    for method in reversed(record.methods):
        method.unmerge(network, name)
    record.merged = 0
    return network


@on_plain
def merge_and_unload(network: nn.Module, name: str | None = None) -> nn.Module:
    """Fold an adapter into the backbone for good and forget it: layers, names and exports are those of a plain network.

    Raises:
        TypeError, ValueError: as :func:`merge`; the network has other adapters.
    """
    name, record = find_record(network, name)
    others = [other for other in adapters_of(network) if other != name]
    if others:
        raise ValueError(
            f"the network has other adapters, for which the backbone would change: {', '.join(others)}. Save and remove them "
            f"first: remove_adapter(network, {others[0]!r})"
        )
    if not record.merged:
        merge(network, name, keep_backup=False)
    for method in reversed(record.methods):
        method.detach(network, name)
    install_replacements(network, name)
    remove_deltas(network, name)
    del adapters_of(network)[name]
    keep_frozen(network)
    return network


@on_plain
def backbone_loaded(network: nn.Module) -> None:
    """Take the backbone's weights of now as those from before training: call it when they were loaded after :func:`adapt`."""
    refuse_merged(network)
    own = dict(named_tensors(network))
    for record in adapters_of(network).values():
        record.originals = {n: own[n].detach().cpu().clone() for n in record.originals}
    for layer, delta in deltas_of(network):
        delta.reset(layer)


@on_plain
def activate(network: nn.Module, *names: str) -> nn.Module:
    """Let the named adapters contribute and all others not, without rebuilding anything; without names, the plain backbone.

    A merged adapter that is switched off is unmerged, and so is one above an adapter that is switched on. Who trains stays
    as it is.

    Raises:
        ValueError: there is no such adapter, or two of them train the same tensor of the backbone or bring a head each.
    """
    records = adapters_of(network)
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        find_record(network, name)
    trained: dict[str, str] = {}
    for name in chosen:
        for n in records[name].originals:
            if n in trained:
                raise ValueError(
                    f"adapters {trained[n]!r} and {name!r} both train {n}; only one of them can be switched on"
                )
            trained[n] = name
    refuse_two_heads(network, chosen)
    with _unmerged(network):
        for name in reversed(records):
            if name not in chosen and records[name].enabled:
                _switch(network, name, False)
        for name in chosen:
            if not records[name].enabled:
                _switch(network, name, True)
    return network


@contextmanager
def disabled(network: nn.Module, name: str | None = None) -> Iterator[nn.Module]:
    """Within the block the network is the untouched backbone: adapters (or the named one) contribute nothing.

    Example::

        with disabled(network):
            before = network(image)
    """
    given, network = network, unwrapped(network)
    records = dict([find_record(network, name)] if name else adapters_of(network).items())
    merged = _unmerge_all(network)
    switched: list[str] = []
    try:
        for other, record in reversed(records.items()):  # the last first: it was trained on top of the others
            if record.enabled:
                _switch(network, other, False)
                switched.append(other)
        if name:
            _merge_again(network, merged)
        yield given
    finally:
        if name:
            _unmerge_all(network)
        for other in reversed(switched):
            _switch(network, other, True)
        _merge_again(network, merged)


@contextmanager
def _unmerged(network: nn.Module) -> Iterator[None]:
    """Within the block no adapter is merged; those that can be are merged again behind it."""
    merged = _unmerge_all(network)
    try:
        yield
    finally:
        _merge_again(network, merged)


def _unmerge_all(network: nn.Module) -> list[str]:
    """Unmerge all adapters, or none when one cannot be; returns them in the order in which they were merged."""
    merged = _merged(network)
    for name in merged:
        require_backups(network, name)
    for name in reversed(merged):
        unmerge(network, name)
    return merged


def _merge_again(network: nn.Module, names: Sequence[str]) -> None:
    """Merge those that are there and switched on, in the order in which they were attached; one above another that is not
    merged cannot be, and stays beside the weights."""
    for name, record in adapters_of(network).items():
        if name in names and record.enabled and not record.merged:
            with suppress(ValueError):
                merge(network, name)


def _merged(network: nn.Module) -> list[str]:
    """The merged adapters, in the order in which they were merged."""
    merged = [(record.merged, name) for name, record in adapters_of(network).items() if record.merged]
    return [name for _, name in sorted(merged)]


def _switch(network: nn.Module, name: str, enabled: bool) -> None:
    """Let an adapter contribute or not; meanwhile it keeps its values of the backbone's tensors aside."""
    record = adapters_of(network)[name]
    if enabled:
        refuse_shared(network, record.originals)
    switched: list[Method] = []
    try:
        for method in record.methods if enabled else reversed(record.methods):
            method.set_enabled(network, name, enabled)
            switched.append(method)
    except Exception:
        for method in reversed(switched):
            method.set_enabled(network, name, not enabled)
        raise
    set_deltas_enabled(network, name, enabled)
    if enabled:
        _assign(network, record.trained)
    record.trained = {} if enabled else _exchange(network, record)
    record.enabled = enabled


def _exchange(network: nn.Module, record: AdapterRecord) -> dict[str, Tensor]:
    """Put the backbone's original values in place; returns the trained ones."""
    trained = {n: t.detach().clone() for n, t in named_tensors(network) if n in record.originals}
    _assign(network, record.originals)
    return trained


@torch.no_grad()
def _assign(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    for n, tensor in named_tensors(network):
        if n in values:
            tensor.copy_(values[n])
