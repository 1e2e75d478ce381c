"""The header of an adapter file: what it says, whether it is whole, and whether it is as it was saved."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = [
    "CHECKSUM",
    "FORMAT",
    "FORMAT_VERSION",
    "AdapterFileError",
    "by_module",
    "checksum",
    "inspect_adapter",
    "not_finite",
    "read_adapter",
    "short_text",
    "some",
    "versions",
]

FORMAT, FORMAT_VERSION = "monai_petl.adapter", 2  # 1 has the fingerprint under whole names, in hexadecimal
CHECKSUM = "sha256"
TEXTS, TABLES = ("name", "network"), ("methods", "also_train", "class_names", "notes", "versions", "fingerprint")
KNOWN = {"format", "format_version", *TEXTS, *TABLES, CHECKSUM}


class AdapterFileError(ValueError):
    """The file is not an adapter, is damaged, or does not fit the network."""


def inspect_adapter(path: str | os.PathLike) -> dict[str, Any]:
    """What the header of an adapter file says, and its number of values and bytes.

    Returns:
        Among others ``methods``, ``class_names``, ``notes``, ``fingerprint``, ``shapes``, and ``sha256``, the checksum of
        header and tensors, which was compared; empty in files from before there was one.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: it is not an adapter file, is damaged, was changed, or comes from a newer version.
    """
    header, tensors = read_adapter(path)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    values = sum(tensor.numel() for tensor in tensors.values())
    return {**header, "shapes": shapes, "values": values, "bytes": Path(path).stat().st_size}


def read_adapter(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The decoded header of an adapter file and its tensors under the names in the file.

    Raises:
        FileNotFoundError, AdapterFileError: as :func:`inspect_adapter`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise AdapterFileError(
            f"{path} is not an adapter file, or is damaged: {error}. Copy or save it again"
        ) from None
    if header.get("format") != FORMAT:
        raise AdapterFileError(f"{path} is a safetensors file but not an adapter saved by save_adapter")
    try:
        decoded = _decoded(header)
    except _NewerError as error:
        raise AdapterFileError(
            f"{path} has adapter format {error}; this monai_petl reads up to {FORMAT_VERSION}. Update it: "
            "pip install --upgrade monai-petl"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path}: the adapter's header is damaged ({error}). Save it again") from None
    except RecursionError:
        raise AdapterFileError(
            f"{path}: the adapter's header is damaged (its JSON is too deep). Save it again"
        ) from None
    strange = [name for name in header if name not in KNOWN]
    if strange:  # such as a checksum under a damaged name, which would not be compared
        raise AdapterFileError(f"{path}: the adapter's header is damaged (unknown entry {strange[0]!r}). Save it again")
    wrong = not_finite(tensors)
    if wrong:
        raise AdapterFileError(f"{path} holds NaN or infinity in {wrong[0]}: its training has diverged. Train it again")
    said = header.get(CHECKSUM, "")
    if said and said != checksum(header, tensors):
        raise AdapterFileError(
            f"{path} was changed after it was saved: its checksum does not fit its content. Copy it again from its source"
        )
    return {**decoded, CHECKSUM: said}, tensors


def checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that an adapter file holds, in hexadecimal: its header without the checksum, and its tensors."""
    rest = {name: value for name, value in header.items() if name != CHECKSUM}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]


def by_module(hashes: Mapping[str, str]) -> dict[str, Any]:
    """Tables within tables, so that the name of a module is written once; one of a single entry is part of its name."""
    modules: dict[str, dict[str, str]] = {}
    for name, value in hashes.items():
        module, _, rest = name.partition(".")
        modules.setdefault(module, {})[rest] = value
    tree: dict[str, Any] = {}
    for module, inside in modules.items():
        below = inside[""] if "" in inside else by_module(inside)
        if isinstance(below, dict) and len(below) == 1:
            [(name, below)] = below.items()
            module = f"{module}.{name}"
        tree[module] = below
    return tree


def _by_name(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The hashes under whole names again."""
    for name, value in tree.items():
        if isinstance(value, str):
            if not value:
                raise ValueError(f"the fingerprint of {prefix}{name} is empty")
            yield prefix + name, value
        else:
            yield from _by_name(value, f"{prefix}{name}.")


def short_text(digest: bytes) -> str:
    """A digest as it stands in fingerprints."""
    return base64.urlsafe_b64encode(digest).decode()


class _NewerError(Exception):
    """The format is of a later version."""


def _decoded(header: Mapping[str, str]) -> dict[str, Any]:
    version = int(header["format_version"])
    if version > FORMAT_VERSION:
        raise _NewerError(str(version))
    decoded: dict[str, Any] = {name: header[name] for name in TEXTS}
    for name in TABLES:
        decoded[name] = json.loads(header[name], object_pairs_hook=_once, parse_constant=_no_constant)
    for name in ("also_train", "class_names"):
        if not isinstance(decoded[name], list) or not all(isinstance(text, str) for text in decoded[name]):
            raise ValueError(f"{name} must be a list of names")
    methods = decoded["methods"]
    if not isinstance(methods, list) or not all(
        isinstance(m, dict) and isinstance(m.get("method"), str) for m in methods
    ):
        raise ValueError("methods must be a list of methods with their options")
    decoded["fingerprint"] = dict(_by_name(decoded["fingerprint"]))
    if version == 1:
        decoded["fingerprint"] = {n: short_text(bytes.fromhex(h)) for n, h in decoded["fingerprint"].items()}
    return {"format_version": version, **decoded}


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no value")


def versions() -> dict[str, str]:
    """Versions of the libraries that an adapter was trained with."""
    return {name: importlib.metadata.version(name) for name in ("monai-petl", "monai", "torch")}


def some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more if names else "none"
