"""The one verb: freeze a network and attach a trained delta to it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from monai_petl.core.deltas import Delta, deltas_of, remove_deltas
from monai_petl.core.frozen import acts_in_training, keep_frozen
from monai_petl.core.wrappers import refuse_wrappers, unwrapped

__all__ = [
    "AdapterRecord",
    "Method",
    "adapt",
    "adapters_of",
    "attach",
    "find_record",
    "first_names",
    "keep_frozen",
    "kinds",
    "named_tensors",
    "refuse_merged",
    "refuse_shared",
    "refuse_two_heads",
    "trainable_parameters",
]


@dataclass(frozen=True)
class Method:
    """How a delta is attached to a network and what it computes. Subclass it as a frozen dataclass of hyper-parameters.

    A subclass is known to adapter files under its class name as soon as it is defined. Its one action is :meth:`attach`,
    which adds a :class:`monai_petl.core.deltas.Delta` to some layers, or sets ``requires_grad`` of tensors that the method
    trains; all else follows from that. Only a method that changes the network in another way writes the other four.
    Modules that hold an adapter's tensors for one task only (the prompts of a class) carry the attribute
    ``is_adapter = True``, and never count as backbone.
    """

    registry: ClassVar[dict[str, type[Method]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Method.registry[cls.__name__] = cls

    def attach(self, network: nn.Module, name: str) -> None:
        """Add the method's part of the adapter ``name`` to ``network`` in place.

        Raises:
            TypeError, ValueError: the network has nothing that the method can handle; names what it was given.
        """
        raise TypeError(f"{type(self).__name__} does not say how it attaches to a network")

    def as_saved(self, network: nn.Module, tensors: Collection[str]) -> Method:
        """The method of an adapter file, before it is attached; another one where its defaults have changed since.

        Args:
            network: what the file is loaded into.
            tensors: names of the file's tensors, such as ``layers.0.conv.lora_A``.
        """
        return self

    def detach(self, network: nn.Module, name: str) -> None:
        """Take away what is neither a delta nor a trained tensor of the backbone."""

    def set_enabled(self, network: nn.Module, name: str, enabled: bool) -> None:
        """Switch on or off what is neither a delta nor a trained tensor of the backbone.

        Raises:
            TypeError: there is such a part (the method writes :meth:`detach`) and it cannot be switched.
        """
        if type(self).detach is not Method.detach:
            raise TypeError(f"{type(self).__name__} cannot be switched off")

    def merge(self, network: nn.Module, name: str) -> None:
        """Fold into the backbone's weights what is neither a delta nor a trained tensor of the backbone.

        Raises:
            TypeError: there is such a part (the method writes :meth:`detach`) and it cannot be folded in.
        """
        if type(self).detach is not Method.detach:
            raise TypeError(
                f"{type(self).__name__} cannot be merged: its delta depends on the input. Keep the adapter attached; "
                "save_adapter writes it to a small file"
            )

    def unmerge(self, network: nn.Module, name: str) -> None:
        """Undo :meth:`merge`, bit for bit."""

    def hyperparameters(self) -> dict[str, Any]:
        """What the adapter file keeps of this method."""
        return asdict(self)


@dataclass
class AdapterRecord:
    """What a network remembers of one adapter.

    Attributes:
        methods: the methods that were attached, in order.
        also_train: the patterns that were given besides.
        tensors: names of the adapter's tensors in the network's state dict.
        originals: values of those among them that belong to the backbone, from before training (on the CPU).
        merged: place in the order of merging, from 1; 0 when the delta is not folded into the backbone at present.
        enabled: whether it contributes at present.
        trained: values of the tensors in ``originals`` while the adapter is switched off.
    """

    methods: list[Method]
    also_train: tuple[str, ...] = ()
    tensors: list[str] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    merged: int = 0
    enabled: bool = True
    trained: dict[str, Tensor] = field(default_factory=dict)


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


def attach(network: nn.Module, methods: Sequence[Method], also_train: Sequence[str], name: str) -> AdapterRecord:
    """Attach methods beside what is there and record them under ``name``; the rest of :func:`adapt` is freezing."""
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


def refuse_shared(network: nn.Module, tensors: Iterable[str]) -> None:
    """A tensor of the backbone has one value at a time: of two adapters that train it, only one can be switched on.

    Raises:
        ValueError: an adapter that is switched on trains one of these tensors.
    """
    for name, record in adapters_of(network).items():
        shared = [n for n in tensors if record.enabled and n in record.originals]
        if shared:
            raise ValueError(
                f"adapter {name!r} trains {shared[0]} of the backbone already (and {len(shared) - 1} tensors more). Switch it "
                f"off with activate(network), or remove it with remove_adapter(network, {name!r}), or train on a backbone "
                "that was saved with it"
            )


def refuse_two_heads(network: nn.Module, names: Sequence[str], new: str | None = None) -> None:
    """An output layer gives the classes of one adapter at a time; two heads would make it answer like neither.

    Args:
        names: adapters that are to be switched on together.
        new: one that is about to bring a head and has none yet.

    Raises:
        ValueError: two of them bring a head.
    """
    layers = {layer: n for n, layer in network.named_modules()}
    heads: dict[str, str] = {}
    for layer, delta in deltas_of(network):
        if delta.replacement is not None and delta.adapter in names:
            heads.setdefault(delta.adapter, layers[layer])
    if new is not None and heads:
        heads.setdefault(new, next(iter(heads.values())))
    if len(heads) > 1:
        first, second = list(heads)[:2]
        raise ValueError(
            f"adapters {first!r} and {second!r} each bring a head of their own in place of {heads[first]}, so that only one of "
            f"them can be switched on. Call activate(network) before the second is attached, then activate(network, {first!r}) "
            f"or activate(network, {second!r}), and run the network once for each"
        )


def refuse_merged(network: nn.Module) -> None:
    """What the backbone is cannot be told while an adapter is folded into it.

    Raises:
        ValueError: an adapter is merged.
    """
    merged = [name for name, record in adapters_of(network).items() if record.merged]
    if merged:
        raise ValueError(
            f"adapter {merged[0]!r} is merged into the backbone; call unmerge(network, {merged[0]!r}) first, or fold it in for "
            f"good with merge_and_unload(network, {merged[0]!r})"
        )


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


def adapters_of(network: nn.Module) -> dict[str, AdapterRecord]:
    """The adapters of a network by name, in the order in which they were attached. The dictionary is the live one."""
    return network.__dict__.setdefault("_adapters", {})


def find_record(network: nn.Module, name: str | None) -> tuple[str, AdapterRecord]:
    """The adapter of this name; without a name, the one that was attached last.

    Raises:
        ValueError: there is no such adapter.
    """
    records = adapters_of(network)
    if name is None and records:
        name = next(reversed(records))
    if name is None or name not in records:
        wanted = "any adapter" if name is None else f"an adapter {name!r}"
        raise ValueError(f"the network has not got {wanted}; it has: {', '.join(records) or 'none'}")
    return name, records[name]


def kinds(methods: Sequence[Method]) -> str:
    """The methods by the names of their classes."""
    return " and ".join(type(method).__name__ for method in methods) or "no method"


def named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers under their state-dict names."""
    yield from network.state_dict(keep_vars=True).items()


def first_names(network: nn.Module) -> dict[str, str]:
    """Every state-dict name -> the first name of the same tensor: modules that a network holds twice, and tied weights."""
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(tensor), name) for name, tensor in named_tensors(network)}


def adapter_module_names(network: nn.Module) -> tuple[str, ...]:
    """Prefixes (with a final dot) of the modules that hold nothing but an adapter's tensors."""
    return tuple(f"{n}." for n, module in network.named_modules() if getattr(module, "is_adapter", False))


def versions() -> dict[str, str]:
    """Versions of the libraries that an adapter was trained with."""
    return {name: importlib.metadata.version(name) for name in ("monai-petl", "monai", "torch")}


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
