"""Prompt tuning of PUNet: a new class is a set of tokens, and nothing else trains.

M. Fischer, A. Bartler, B. Yang, "Prompt Tuning for Parameter-efficient Medical Image Segmentation", arXiv:2211.09233 (2022).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from monai_petl.core.adapters import save_adapter
from monai_petl.core.method import Method
from monai_petl.core.records import AdapterRecord, adapters_of, named_tensors
from monai_petl.networks import PUNet

__all__ = ["PromptTuning", "class_replaced", "export_class", "punet_of", "put_back", "show_class"]

Replaced = Sequence[tuple[nn.ModuleDict, int, nn.Module]]  # plain data: modules in it do not count as submodules


@dataclass(frozen=True)
class PromptTuning(Method):
    """Teach a :class:`monai_petl.networks.PUNet` one class by its prompt tokens (57,344 values in the default network).

    Every other class's logits stay bit-identical. The start is not the identity: a class that is not there has no output
    to preserve.

    Args:
        class_name: the class; fresh prompts replace what the network may hold under this name, until they are removed.
        depth: levels that get tokens: ``"full"``, ``"encoder"``, ``"decoder"``, ``"start"`` or ``"end"``.
        init: ``"random"``, ``"mean"`` of the classes that are there, or ``"copy:<class>"``.
        own_background: train a copy of the head's background tokens with the class (512 values more). Use it after
            pre-training without segmentation, where the shared ones were never trained.
    """

    class_name: str
    depth: str = "full"
    init: str = "random"
    own_background: bool = False

    def attach(self, network: nn.Module, name: str) -> None:
        punet = punet_of(network, "PromptTuning")
        with class_replaced(punet, self.class_name) as before:
            new = punet.prompts.add_class(self.class_name, self.init, self.depth, self.own_background)
            new.replaced = before

    def detach(self, network: nn.Module, name: str) -> None:
        punet = punet_of(network, "PromptTuning")
        before = punet.prompts[self.class_name].replaced
        punet.prompts.remove_class(self.class_name)
        put_back(punet, self.class_name, before)

    def set_enabled(self, network: nn.Module, name: str, enabled: bool) -> None:
        show_class(punet_of(network, "PromptTuning"), self.class_name, enabled)


def export_class(
    network: PUNet, class_name: str, path: str | os.PathLike, notes: Mapping[str, Any] | str | None = None
) -> Path:
    """Write any class of a network to an adapter file, a class of pre-training too.

    The file is what :func:`monai_petl.save_adapter` writes after prompt tuning: :func:`monai_petl.load_adapter` adds the
    class to every network with the same backbone.

    Args:
        network: a network with prompts for the class.
        class_name: the class.
        path: the ``.safetensors`` file.
        notes: kept in the header.

    Raises:
        KeyError: the network has no prompts for the class.
    """
    records, prompts = adapters_of(network), network.prompts[class_name]
    for name, record in records.items():
        if any(getattr(method, "class_name", None) == class_name for method in record.methods):
            return save_adapter(network, path, notes, name)
    prefix = f"prompts.classes.{class_name}."
    method = PromptTuning(class_name, prompts.depth, own_background=prompts.background_tokens is not None)
    others = dict(records)
    records.clear()  # a class of pre-training comes before all adapters
    records[class_name] = AdapterRecord(
        [method], tensors=[n for n, _ in named_tensors(network) if n.startswith(prefix)]
    )
    records.update(others)
    try:
        return save_adapter(network, path, notes, class_name)
    finally:
        del records[class_name]


def punet_of(network: nn.Module, method: str) -> PUNet:
    """The network, when it is a PUNet.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(network, PUNet):
        raise TypeError(f"{method} needs a monai_petl.networks.PUNet, got {type(network).__name__}")
    return network


@contextmanager
def class_replaced(punet: PUNet, name: str) -> Iterator[Replaced]:
    """Make room for a class that the backbone may hold already; after an error in the block it is there again.

    Raises:
        ValueError: the class belongs to another adapter.
    """
    for adapter, record in adapters_of(punet).items():
        if any(n.startswith((f"prompts.classes.{name}.", f"heads.{name}.")) for n in record.tensors):
            raise ValueError(
                f"class {name!r} belongs to adapter {adapter!r}; remove it first with remove_adapter(network, {adapter!r})"
            )
    holders = [holder for holder in (punet.prompts.classes, punet.heads) if name in holder]
    before = [(holder, list(holder).index(name), holder.pop(name)) for holder in holders]
    try:
        yield before
    except Exception:
        put_back(punet, name, before)
        raise


def put_back(punet: PUNet, name: str, before: Replaced) -> None:
    """Undo :func:`class_replaced`: the class is where it was in the order of classes, on the device where the others are."""
    like = punet.prompts.background
    for holder, index, module in before:
        module.to(like.device, like.dtype).train(punet.training)
        items = list(holder.items())
        items.insert(index, (name, module))
        holder.clear()
        for key, value in items:
            holder[key] = value


def show_class(punet: PUNet, name: str, shown: bool) -> None:
    """Hide an adapter's class or show it again; what it took the place of is there meanwhile."""
    holders = [holder for holder in (punet.prompts.classes, punet.heads) if name in holder]
    now = [(holder, list(holder).index(name), holder[name]) for holder in holders]
    other: Replaced = cast(Any, now[0][2]).replaced
    if not other:
        punet.show(name, shown)
        return
    for holder in holders:
        del holder[name]
    put_back(punet, name, other)
    for _, _, module in other:
        cast(Any, module).replaced = now
    for _, _, module in now:
        cast(Any, module).replaced = ()
