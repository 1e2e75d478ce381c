"""The trained delta as a small file: save it, load it, look into it.

An adapter file is a safetensors file (never pickle) with a header that says which method made it and which backbone it
fits: a fingerprint of every frozen tensor it was trained against.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monai_petl.core.adapt import (
    AdapterRecord,
    Method,
    adapter_module_names,
    adapters_of,
    attach,
    find_record,
    first_names,
    keep_frozen,
    named_tensors,
    refuse_merged,
    restored_on_error,
    versions,
)
from monai_petl.core.adapter_file import (
    CHECKSUM,
    FORMAT,
    FORMAT_VERSION,
    AdapterFileError,
    by_module,
    checksum,
    inspect_adapter,
    not_finite,
    read_adapter,
    short_text,
)
from monai_petl.core.switching import remove_adapter
from monai_petl.core.wrappers import on_plain, refuse_wrappers, unwrapped
from monai_petl.files.tensor_files import write_tensors

logger = logging.getLogger(__name__)

__all__ = [
    "AdapterFileError",
    "adapter_state_dict",
    "backbone_state_dict",
    "inspect_adapter",
    "load_adapter",
    "save_adapter",
]


@on_plain
def adapter_state_dict(network: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The tensors of one adapter (default: the one attached last) under their names in the network's state dict."""
    _, record = find_record(network, name)
    state = network.state_dict()
    return {n: state[n] for n in record.tensors}


@on_plain
def backbone_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the network without its adapters: the plain network's names, and its values from before training.

    Raises:
        ValueError: an adapter is merged into it.
    """
    refuse_merged(network)
    own = {n for record in adapters_of(network).values() for n in record.tensors}
    before = {n: t for record in adapters_of(network).values() for n, t in record.originals.items()}
    first = first_names(network)
    state = network.state_dict()
    return {n: before.get(first[n], t) for n, t in state.items() if first[n] in before or first[n] not in own}


@on_plain
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
        ValueError: the network has no such adapter, it is merged or switched off, or holds NaN or infinity.
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
        "fingerprint": json.dumps(by_module(_under_first_names(network, record)), separators=(",", ":")),
    }
    refuse_merged(network)
    tensors = {_file_name(n, name): t for n, t in adapter_state_dict(network, name).items()}
    if wrong := not_finite(tensors):
        raise ValueError(
            f"adapter {name!r} is not saved: {_some(wrong)} hold NaN or infinity. The training has diverged; lower "
            "the learning rate"
        )
    return write_tensors(path, tensors, {**header, CHECKSUM: checksum(header, tensors)}, "the adapter")


def load_adapter(
    network: nn.Module, path: str | os.PathLike, name: str | None = None, trainable: bool = False
) -> nn.Module:
    """Attach the adapter of a file to the backbone it was trained on, by the method that the file names.

    Other adapters of the network stay as they are, and those that are switched on contribute besides.

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
        ValueError: the network has an adapter of that name; names the methods of both.
    """
    refuse_wrappers(network)
    given, network = network, unwrapped(network)
    header, tensors = read_adapter(path)
    if not header[CHECKSUM]:
        logger.info("%s has no checksum, as files from before there was one; its values are not compared", path)
    methods = _methods(path, header)
    refuse_merged(network)
    _check_fingerprint(network, path, header)
    name = name or header["name"]
    with restored_on_error(network):
        if not adapters_of(network):  # a network that is given an adapter is a backbone from now on
            network.requires_grad_(False)
        try:
            methods = [method.as_saved(network, tensors) for method in methods]
            record = attach(network, methods, header["also_train"], name)
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError, re.error) as error:
            if name in adapters_of(network):
                raise
            raise AdapterFileError(f"{path} cannot be attached to this {type(network).__name__}: {error}") from error
        trained = set(record.tensors)
        own = {_file_name(n, name): t for n, t in named_tensors(network) if n in trained}
        try:
            if not header["fingerprint"] and _under_first_names(network, record):
                raise AdapterFileError(f"{path} does not say which backbone it was trained on. Save it again")
            _check_shapes(
                path, {n: list(t.shape) for n, t in own.items()}, {n: list(t.shape) for n, t in tensors.items()}
            )
            with torch.no_grad():
                for n, tensor in own.items():
                    tensor.copy_(tensors[n])
        except Exception:
            remove_adapter(network, name)
            raise
    if not trainable:
        for tensor in own.values():
            tensor.requires_grad_(False)
        keep_frozen(network)
    return given


def _methods(path: str | os.PathLike, header: Mapping[str, Any]) -> list[Method]:
    unknown = [m["method"] for m in header["methods"] if m["method"] not in Method.registry]
    if unknown:
        raise AdapterFileError(
            f"{path} was made with the method {unknown[0]}, which is not known here. Import the module that defines it first"
        )
    try:
        return [
            Method.registry[m["method"]](**{key: value for key, value in m.items() if key != "method"})
            for m in header["methods"]
        ]
    except TypeError as error:
        raise AdapterFileError(f"{path} has an option that is not known here: {error}. Update monai-petl") from None
    except (ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterFileError(f"{path} has an option that cannot be: {error}. Save it again") from None


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


def _under_first_names(network: nn.Module, record: AdapterRecord) -> dict[str, str]:
    """The fingerprint with each tensor once; a network may hold it under several names."""
    first = first_names(network)
    return {n: value for n, value in _fingerprint(network, record).items() if first[n] == n}


def _file_name(tensor: str, adapter: str) -> str:
    """A delta's tensor without the adapter's name: ``qkv.deltas.lora_kidney.A`` is ``qkv.lora_A`` in files."""
    return re.sub(rf"(^|\.)deltas\.([^.]+)_{re.escape(adapter)}\.", r"\1\2_", tensor)


def _hash(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{data.dtype}{tuple(data.shape)}".encode(), digest_size=6)
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return short_text(digest.digest())


def _check_fingerprint(network: nn.Module, path: str | os.PathLike, header: Mapping[str, Any]) -> None:
    wanted, found = header["fingerprint"], _fingerprint(network, None)
    missing = [n for n in wanted if n not in found]
    differing = [n for n in wanted if n in found and found[n] != wanted[n]]
    if not missing and not differing:
        return
    if not missing and all(n.endswith("position_embeddings") for n in differing):
        raise AdapterFileError(
            f"{path} was trained for images of another size: of its {len(wanted)} frozen tensors only the positions differ "
            f"({_some(differing)}). Build the network for that size, load the adapter, and then change the size "
            "(ViTClassifier.resize)"
        )
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
