"""The trained delta as a small file: save it, load it, look into it.

An adapter file is a safetensors file (never pickle) with a header that says which method made it and which backbone it
fits: a fingerprint of every frozen tensor it was trained against.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monai_petl.core.adapt import attach, restored_on_error
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
    some,
    versions,
)
from monai_petl.core.fingerprint import check_fingerprint, fingerprint
from monai_petl.core.frozen import keep_frozen
from monai_petl.core.method import Method
from monai_petl.core.records import (
    AdapterRecord,
    adapters_of,
    find_record,
    first_names,
    named_tensors,
    refuse_merged,
)
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
        "fingerprint": json.dumps(by_module(fingerprint(network, record)), separators=(",", ":")),
    }
    refuse_merged(network)
    tensors = {_file_name(n, name): t for n, t in adapter_state_dict(network, name).items()}
    if wrong := not_finite(tensors):
        raise ValueError(
            f"adapter {name!r} is not saved: {some(wrong)} hold NaN or infinity. The training has diverged; lower "
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
    refuse_merged(network)
    check_fingerprint(network, path, header)
    name = name or header["name"]

    def fill(record: AdapterRecord) -> None:
        trained = set(record.tensors)
        own = {_file_name(n, name): t for n, t in named_tensors(network) if n in trained}
        if not header["fingerprint"] and fingerprint(network, record):
            raise AdapterFileError(f"{path} does not say which backbone it was trained on. Save it again")
        _check_shapes(path, _shapes(own), _shapes(tensors))
        with torch.no_grad():
            for n, tensor in own.items():
                tensor.copy_(tensors[n])

    with restored_on_error(network), _as_error_of_the_file(path, network, name):
        methods = [method.as_saved(network, tensors) for method in _methods(path, header)]
        if not adapters_of(network):  # a network that is given an adapter is a backbone from now on
            network.requires_grad_(False)
        record = attach(network, methods, header["also_train"], name, fill)
    if not trainable:
        trained = set(record.tensors)
        for n, tensor in named_tensors(network):
            if n in trained:
                tensor.requires_grad_(False)
        keep_frozen(network)
    return given


@contextmanager
def _as_error_of_the_file(path: str | os.PathLike, network: nn.Module, name: str) -> Iterator[None]:
    """What a method says when it cannot attach is about the file, unless the name is taken."""
    taken = name in adapters_of(network)
    try:
        yield
    except AdapterFileError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError, re.error) as error:
        if taken:
            raise
        raise AdapterFileError(f"{path} cannot be attached to this {type(network).__name__}: {error}") from error


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


def _file_name(tensor: str, adapter: str) -> str:
    """A delta's tensor without the adapter's name: ``qkv.deltas.lora_kidney.A`` is ``qkv.lora_A`` in files."""
    return re.sub(rf"(^|\.)deltas\.([^.]+)_{re.escape(adapter)}\.", r"\1\2_", tensor)


def _check_shapes(path: str | os.PathLike, network: Mapping[str, list[int]], file: Mapping[str, list[int]]) -> None:
    missing, extra = [n for n in network if n not in file], [n for n in file if n not in network]
    if missing or extra:
        raise AdapterFileError(
            f"{path} does not fit: tensors missing in the file: {some(missing)}; left over in the file: {some(extra)}"
        )
    for n, shape in network.items():
        if shape != file[n]:
            raise AdapterFileError(
                f"{path} does not fit: {n} has shape {file[n]} in the file, the network needs {shape}"
            )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
