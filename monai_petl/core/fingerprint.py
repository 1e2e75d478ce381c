"""Which backbone an adapter was trained on: a hash of every tensor that it was trained against."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from monai_petl.core.adapter_file import AdapterFileError, short_text, some
from monai_petl.core.records import AdapterRecord, adapter_module_names, adapters_of, first_names, named_tensors

__all__ = ["check_fingerprint", "fingerprint"]


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


def fingerprint(network: nn.Module, record: AdapterRecord) -> dict[str, str]:
    """The fingerprint with each tensor once; a network may hold it under several names."""
    first = first_names(network)
    return {n: value for n, value in _fingerprint(network, record).items() if first[n] == n}


def check_fingerprint(network: nn.Module, path: str | os.PathLike, header: Mapping[str, Any]) -> None:
    wanted, found = header["fingerprint"], _fingerprint(network, None)
    missing = [n for n in wanted if n not in found]
    differing = [n for n in wanted if n in found and found[n] != wanted[n]]
    if not missing and not differing:
        return
    if not missing and all(n.endswith("position_embeddings") for n in differing):
        raise AdapterFileError(
            f"{path} was trained for images of another size: of its {len(wanted)} frozen tensors only the positions differ "
            f"({some(differing)}). Build the network for that size, load the adapter, and then change the size "
            "(ViTClassifier.resize)"
        )
    parts = [
        f"{len(names)} {what} ({some(names)})"
        for names, what in ((missing, "missing"), (differing, "with other values or shapes"))
        if names
    ]
    raise AdapterFileError(
        f"{path} was trained on another backbone ({header['network']}): of its {len(wanted)} frozen tensors this "
        f"{type(network).__name__} has {' and '.join(parts)}. Load the weights of that backbone first"
    )


def _hash(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{data.dtype}{tuple(data.shape)}".encode(), digest_size=6)
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return short_text(digest.digest())
