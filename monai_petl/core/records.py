"""What a network remembers of its adapters, and which of them can be there together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from monai_petl.core.deltas import deltas_of
from monai_petl.core.method import Method

__all__ = [
    "AdapterRecord",
    "adapter_module_names",
    "adapters_of",
    "find_record",
    "first_names",
    "named_tensors",
    "refuse_merged",
    "refuse_shared",
    "refuse_two_heads",
]


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
