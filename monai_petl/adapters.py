"""The trained delta as a small file: save it, load it, look into it, take it away, fold it in.

An adapter file is a safetensors file (never pickle) with a header that says which method made it and which backbone it
fits: a fingerprint of every frozen tensor it was trained against.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from monai_petl.adapt import (
    AdapterRecord,
    Method,
    adapter_module_names,
    adapters_of,
    attach,
    find_record,
    keep_frozen,
    named_tensors,
    refuse_merged,
    refuse_shared,
    restored_on_error,
    versions,
)
from monai_petl.deltas import (
    deltas_of,
    install_replacements,
    merge_deltas,
    remove_deltas,
    require_backups,
    set_deltas_enabled,
    unmerge_deltas,
)
from monai_petl.tensor_files import write_tensors

__all__ = [
    "AdapterFileError",
    "activate",
    "adapter_state_dict",
    "backbone_loaded",
    "backbone_state_dict",
    "disabled",
    "inspect_adapter",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "remove_adapter",
    "save_adapter",
    "unmerge",
]

FORMAT, FORMAT_VERSION = "monai_petl.adapter", 1


class AdapterFileError(ValueError):
    """The file is not an adapter, is damaged, or does not fit the network."""


def adapter_state_dict(network: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The tensors of one adapter (default: the one attached last) under their names in the network's state dict."""
    _, record = find_record(network, name)
    state = network.state_dict()
    return {n: state[n] for n in record.tensors}


def backbone_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the network without its adapters: the plain network's names, and its values from before training.

    Raises:
        ValueError: an adapter is merged into it.
    """
    refuse_merged(network)
    own = {n for record in adapters_of(network).values() for n in record.tensors}
    before = {n: t for record in adapters_of(network).values() for n, t in record.originals.items()}
    return {n: before.get(n, t) for n, t in network.state_dict().items() if n in before or n not in own}


def save_adapter(
    network: nn.Module, path: str | os.PathLike, notes: Mapping[str, Any] | str | None = None, name: str | None = None
) -> Path:
    """Write one adapter to a ``.safetensors`` file; the file appears whole or not at all.

    Args:
        network: a network with an adapter.
        path: where to write; missing folders are made.
        notes: a sentence or a table about the training data, kept in the header.
        name: which adapter; default the one attached last.

    Returns:
        The path.

    Raises:
        ValueError: the network has no such adapter, or it is merged or switched off.
        OSError: the place cannot be written to.
    """
    name, record = find_record(network, name)
    if record.merged:
        raise ValueError(f"adapter {name!r} is merged into the backbone; call unmerge(network) before saving it")
    if not record.enabled:
        raise ValueError(
            f"adapter {name!r} is switched off; save it outside the block of disabled(), or after activate(network, {name!r})"
        )
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "name": name,
        "methods": json.dumps([{"method": type(m).__name__, **m.hyperparameters()} for m in record.methods]),
        "also_train": json.dumps(record.also_train),
        "network": type(network).__name__,
        "class_names": json.dumps([m.class_name for m in record.methods if hasattr(m, "class_name")]),
        "notes": json.dumps(notes),
        "versions": json.dumps(versions()),
        "fingerprint": json.dumps(_fingerprint(network, record), separators=(",", ":")),
    }
    refuse_merged(network)
    tensors = {_file_name(n, name): t for n, t in adapter_state_dict(network, name).items()}
    return write_tensors(path, tensors, header, "the adapter")


def inspect_adapter(path: str | os.PathLike) -> dict[str, Any]:
    """What the header of an adapter file says, and its number of values and bytes. Reads no tensor.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: it is not an adapter file, is damaged, or comes from a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            shapes = {n: list(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{path} is not an adapter file, or is damaged: {error}. Copy or save it again"
        ) from error
    if header.get("format") != FORMAT:
        raise AdapterFileError(f"{path} is a safetensors file but not an adapter saved by save_adapter")
    try:
        version = int(header["format_version"])
        if version > FORMAT_VERSION:
            raise AdapterFileError(
                f"{path} has adapter format {version}; this monai_petl reads up to {FORMAT_VERSION}. Update it: "
                "pip install --upgrade monai-petl"
            )
        decoded = {n: header[n] for n in ("name", "network")}
        for n in ("methods", "also_train", "class_names", "notes", "versions", "fingerprint"):
            decoded[n] = json.loads(header[n])
        named = all(isinstance(m, dict) and isinstance(m.get("method"), str) for m in decoded["methods"])
        if not named or not isinstance(decoded["fingerprint"], dict) or not isinstance(decoded["also_train"], list):
            raise ValueError("methods, also_train or fingerprint have another form")
    except AdapterFileError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path}: the adapter's header is damaged ({error}). Save it again") from error
    return {
        "format_version": version,
        **decoded,
        "shapes": shapes,
        "values": sum(_product(shape) for shape in shapes.values()),
        "bytes": path.stat().st_size,
    }


def load_adapter(
    network: nn.Module, path: str | os.PathLike, name: str | None = None, trainable: bool = False
) -> nn.Module:
    """Attach the adapter of a file to the backbone it was trained on. Other adapters of the network stay as they are.

    Args:
        network: the backbone.
        path: a file written by :func:`save_adapter`.
        name: a name on this network other than the one in the file.
        trainable: whether the adapter is to be trained further.

    Returns:
        The same network. After an error it is as it was.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: not an adapter file; another backbone (says which tensors differ); tensors that are missing,
            left over, or of another shape; a method that is not known here.
        ValueError: the network has an adapter of that name.
    """
    header = inspect_adapter(path)
    unknown = [m["method"] for m in header["methods"] if m["method"] not in Method.registry]
    if unknown:
        raise AdapterFileError(
            f"{path} was made with the method {unknown[0]}, which is not known here. Import the module that defines it first"
        )
    try:
        methods = [
            Method.registry[m["method"]](**{key: value for key, value in m.items() if key != "method"})
            for m in header["methods"]
        ]
    except TypeError as error:
        raise AdapterFileError(f"{path} has an option that is not known here: {error}. Update monai-petl") from error
    refuse_merged(network)
    _check_fingerprint(network, path, header)
    name = name or header["name"]
    with restored_on_error(network):
        if not adapters_of(network):  # a network that is given an adapter is a backbone from now on
            network.requires_grad_(False)
        record = attach(network, methods, header["also_train"], name)
        trained = set(record.tensors)
        own = {_file_name(n, name): t for n, t in named_tensors(network) if n in trained}
        try:
            _check_shapes(path, {n: list(t.shape) for n, t in own.items()}, header["shapes"])
            with torch.no_grad(), safe_open(path, framework="pt") as file:
                for n, tensor in own.items():
                    tensor.copy_(file.get_tensor(n))
        except Exception:
            remove_adapter(network, name)
            raise
    if not trainable:
        for tensor in own.values():
            tensor.requires_grad_(False)
        keep_frozen(network)
    return network


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


def backbone_loaded(network: nn.Module) -> None:
    """Take the backbone's weights of now as those from before training: call it when they were loaded after :func:`adapt`."""
    refuse_merged(network)
    own = dict(named_tensors(network))
    for record in adapters_of(network).values():
        record.originals = {n: own[n].detach().cpu().clone() for n in record.originals}
    for layer, delta in deltas_of(network):
        delta.reset(layer)


def activate(network: nn.Module, *names: str) -> nn.Module:
    """Let the named adapters contribute and all others not, without rebuilding anything; without names, the plain backbone.

    A merged adapter that is switched off is unmerged, and so is one above an adapter that is switched on. Who trains stays
    as it is.

    Raises:
        ValueError: there is no such adapter, or two of them train the same tensor of the backbone.
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
        yield network
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
        _assign(network, record.trained)
        record.trained = {}
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
    if not enabled:
        record.trained = _exchange(network, record)
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


def _fingerprint(network: nn.Module, record: AdapterRecord | None) -> dict[str, str]:
    """Name -> hash of every tensor that the adapter was trained against: all but its own and those of other tasks.

    What an earlier adapter changes in the backbone itself (and not for a task such as a class) counts: it was trained on
    top of that. What later ones change does not, nor those that are switched off.
    """
    foreign = adapter_module_names(network)
    own = set(record.tensors if record else ())
    before: dict[str, Tensor] = {}
    later = False
    for other in adapters_of(network).values():
        if later or not other.enabled:
            own |= set(other.tensors) - set(other.originals)
            before |= other.originals
        later |= other is record
    return {n: _hash(before.get(n, t)) for n, t in named_tensors(network) if n not in own and not n.startswith(foreign)}


def _file_name(tensor: str, adapter: str) -> str:
    """A delta's tensor without the adapter's name: ``qkv.deltas.lora_kidney.A`` is ``qkv.lora_A`` in files."""
    return re.sub(rf"(^|\.)deltas\.([^.]+)_{re.escape(adapter)}\.", r"\1\2_", tensor)


def _hash(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{data.dtype}{tuple(data.shape)}".encode(), digest_size=6)
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_fingerprint(network: nn.Module, path: str | os.PathLike, header: Mapping[str, Any]) -> None:
    wanted, found = header["fingerprint"], _fingerprint(network, None)
    missing = [n for n in wanted if n not in found]
    differing = [n for n in wanted if n in found and found[n] != wanted[n]]
    if not missing and not differing:
        return
    parts = [
        f"{len(names)} {what} ({_some(names)})"
        for names, what in ((missing, "missing"), (differing, "with other values or shapes"))
        if names
    ]
    raise AdapterFileError(
        f"{path} was trained on another backbone ({header['network']}): of its {len(wanted)} frozen tensors this "
        f"{type(network).__name__} has {' and '.join(parts)}. Load the weights of that backbone first"
    )


def _check_shapes(path: str | os.PathLike, network: Mapping[str, list[int]], file: Mapping[str, list[int]]) -> None:
    missing, extra = [n for n in network if n not in file], [n for n in file if n not in network]
    if missing or extra:
        raise AdapterFileError(
            f"{path} does not fit: tensors missing in the file: {_some(missing)}; left over in the file: {_some(extra)}"
        )
    for n, shape in network.items():
        if shape != file[n]:
            raise AdapterFileError(
                f"{path} does not fit: {n} has shape {file[n]} in the file, the network needs {shape}"
            )


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more if names else "none"


def _product(shape: list[int]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product
