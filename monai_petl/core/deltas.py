"""Trained additions to single layers and blocks of a network, in place: the network keeps its class, forward and names.

A layer that carries deltas becomes an instance of a subclass of its own class (``Linear`` of ``AdaptedLinear``) and holds
them in ``deltas``; without the last one it is what it was. Copying, pickling, scripting and compiling work as before.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Delta",
    "add_delta",
    "deltas_of",
    "install_replacements",
    "merge_deltas",
    "remove_deltas",
    "require_backups",
    "set_deltas_enabled",
    "unmerge_deltas",
]


class Delta(nn.Module):
    """What an adapter computes at one layer: from the layer's input and output a new output.

    A subclass has a ``tag``, which names its tensors in files (``<layer>.<tag>_<tensor>``), and either :meth:`forward`
    (anywhere) or :meth:`around` (at blocks, that is modules whose forward has arguments besides the input).
    """

    tag = "delta"
    __jit_unused_properties__ = ("replacement",)  # TorchScript need not understand it

    def __init__(self) -> None:
        super().__init__()
        self.adapter = ""  # the name of the adapter that it belongs to
        self.enabled = True
        self.active = True  # enabled and not merged
        self.backup: dict[str, Tensor] | None = None  # the layer's parameters from before merging
        self.merged = False

    @property
    def replacement(self) -> nn.Module | None:
        """The module that this delta stands for, when it takes the layer's place altogether; it is never merged."""
        return None

    def reset(self, layer: nn.Module) -> None:
        """Begin anew from the layer's weights, which were loaded after the delta was added."""

    def resize(self, trained: Sequence[int], grid: Sequence[int]) -> None:
        """Interpolate what is kept by position, when a transformer is changed from one grid of patches to another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The new output, from the layer's input and output (not changed in place)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, y), or around() at a block")

    def folded(self, weight: Tensor, x: Tensor) -> Tensor | None:
        """The weight with which a convolution computes :meth:`forward` by itself, where that costs less.

        Args:
            weight: the layer's, with the deltas folded in that were added before.
            x: the layer's input.

        Returns:
            Nothing where :meth:`forward` is to be called instead.
        """
        return None

    def around(self, block: nn.Module, run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The new output of a block; ``run`` is the block's own forward, with the deltas that were added before."""
        return self(x, run(x, *args, **kwargs))

    def merged_parameters(self, layer: nn.Module) -> dict[str, Tensor]:
        """Values of the layer's parameters with which it computes the same without this delta, in float32 or better.

        Raises:
            TypeError: there are none, since the delta depends on the input.
            ValueError: this layer has no place for them.
        """
        raise TypeError(
            f"an adapter with {type(self).__name__} cannot be merged: what it adds is no linear function of the input. Keep "
            "it attached; save_adapter writes it to a small file"
        )


class _Adapted:
    """The part that all adapted layers share."""

    def __reduce__(self) -> tuple:
        return _blank, (_base(type(self)),), self.__dict__  # type: ignore[attr-defined]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint of the plain network loads too: what it has not got of the deltas stays as it is."""
        for name, tensor in self.deltas.state_dict(prefix=f"{prefix}deltas.").items():  # type: ignore[attr-defined]
            state_dict.setdefault(name, tensor)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


class _AdaptedLayer(_Adapted):
    """A module of one input. TorchScript compiles ``forward``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(x)

    def beside(self, x: Tensor) -> Tensor:
        y = self.base_forward(x)  # type: ignore[attr-defined]
        for delta in self.deltas.values():  # type: ignore[attr-defined]
            if delta.active:
                y = delta(x, y)
        return y


class _AdaptedConvolution(_AdaptedLayer):
    """A convolution, which runs once, with another weight, where all its deltas can be folded in."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor | None = self.weight  # type: ignore[attr-defined]
        for delta in self.deltas.values():  # type: ignore[attr-defined]
            if delta.active and weight is not None:
                weight = delta.folded(weight, x)
        return self.beside(x) if weight is None else self.convolve(x, weight)  # type: ignore[attr-defined]


class _AdaptedBlock(_Adapted):
    """A module whose forward has arguments besides the input, such as a mask."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = self.base_forward  # type: ignore[attr-defined]
        for delta in self.deltas.values():  # type: ignore[attr-defined]
            if delta.active:
                run = functools.partial(delta.around, self, run)
        return run(x, *args, **kwargs)


def add_delta(layer: nn.Module, delta: Delta, adapter: str) -> None:
    """Put a delta on a layer, behind those that are there; it comes to the layer's device and type.

    Raises:
        ValueError: the adapter has a delta of this kind there already, or its name has a dot.
    """
    if "." in adapter or not adapter:
        raise ValueError(f"an adapter's name must be a word without dots, got {adapter!r}")
    if not isinstance(layer, _Adapted):
        layer.__class__ = _adapted_class(type(layer))
        layer.deltas = nn.ModuleDict()
    deltas: Any = layer.deltas
    key = f"{delta.tag}_{adapter}"
    if key in deltas:
        raise ValueError(
            f"adapter {adapter!r} has a delta of the kind {delta.tag!r} at this {_base(type(layer)).__name__} already; choose "
            "other targets"
        )
    delta.adapter = adapter
    like = next((p for p in layer.parameters() if p.is_floating_point()), None)
    deltas[key] = delta.train(layer.training) if like is None else delta.to(like).train(layer.training)


def deltas_of(network: nn.Module, adapter: str | None = None) -> list[tuple[nn.Module, Delta]]:
    """The deltas of one adapter, or of all, each with its layer, in the order of the network's modules."""
    return [
        (layer, delta)
        for layer in network.modules()
        if isinstance(layer, _Adapted)
        for delta in cast(Any, layer).deltas.values()
        if adapter is None or delta.adapter == adapter
    ]


def remove_deltas(network: nn.Module, adapter: str) -> None:
    """Take the deltas of an adapter away; a layer without any is of its own class again."""
    for layer, delta in deltas_of(network, adapter):
        deltas: Any = layer.deltas
        del deltas[f"{delta.tag}_{adapter}"]
        if not deltas:
            del layer.deltas
            layer.__class__ = _base(type(layer))


def install_replacements(network: nn.Module, adapter: str) -> None:
    """Put the layers that an adapter brought along where they stood in for others."""
    names = {module: name for name, module in network.named_modules()}
    for layer, delta in deltas_of(network, adapter):
        if delta.replacement is not None:
            network.set_submodule(names[layer], delta.replacement)


def set_deltas_enabled(network: nn.Module, adapter: str, enabled: bool) -> None:
    """Switch the deltas of an adapter on or off."""
    for _, delta in deltas_of(network, adapter):
        delta.enabled = enabled
        delta.active = enabled and not delta.merged


@torch.no_grad()
def merge_deltas(network: nn.Module, adapter: str, keep_backup: bool = True) -> None:
    """Fold the deltas of an adapter into the parameters of their layers, all or none.

    Raises:
        TypeError, ValueError: a delta cannot be folded in; names its layer.
    """
    names = {module: name for name, module in network.named_modules()}
    owners: dict[int, list[str]] = {}
    for module, name in names.items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    done: list[Delta] = []
    try:
        for layer, delta in deltas_of(network, adapter):
            if delta.replacement is not None:
                continue
            below = [d for d in cast(Any, layer).deltas.values() if d.active]
            if below[0] is not delta:
                raise ValueError(
                    f"adapter {below[0].adapter!r} comes first at {names[layer]}; merge it first, or switch it off"
                )
            try:
                values = delta.merged_parameters(layer)
            except ValueError as error:
                raise ValueError(f"{names[layer]} {error}") from error
            tied = next(
                (owners[id(layer.get_parameter(n))] for n in values if len(owners[id(layer.get_parameter(n))]) > 1), []
            )
            if tied:
                others = " and ".join(name for name in tied if name != names[layer])
                raise ValueError(
                    f"{names[layer]} shares its weight with {others}, which merging would change too. Keep the adapter "
                    "attached, or give the layer a weight of its own first"
                )
            delta.backup = {name: layer.get_parameter(name).clone() for name in values}
            _assign(layer, values)
            delta.merged, delta.active = True, False
            done.append(delta)
    except Exception:
        unmerge_deltas(network, adapter)
        raise
    if not keep_backup:
        for delta in done:
            delta.backup = None


@torch.no_grad()
def unmerge_deltas(network: nn.Module, adapter: str) -> None:
    """Put the parameters from before merging back, bit for bit. The adapter is the one that was merged last.

    Raises:
        ValueError: they were not kept.
    """
    merged = [(layer, delta) for layer, delta in deltas_of(network, adapter) if delta.merged]
    require_backups(network, adapter)
    for layer, delta in reversed(merged):
        _assign(layer, delta.backup or {})
        delta.merged, delta.active, delta.backup = False, delta.enabled, None


def require_backups(network: nn.Module, adapter: str) -> None:
    """
    Raises:
        ValueError: the adapter was merged for good.
    """
    if any(delta.merged and delta.backup is None for _, delta in deltas_of(network, adapter)):
        raise ValueError(
            f"adapter {adapter!r} was merged with keep_backup=False: the weights from before are gone. Load the backbone and "
            "the adapter again"
        )


def _assign(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        layer.get_parameter(name).copy_(value)


def _base(adapted: type) -> type[nn.Module]:
    return adapted.__bases__[1]


def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _CLASSES:
        mixin = _AdaptedLayer if _has_one_input(base) else _AdaptedBlock
        members: dict[str, Any] = {"base_forward": _renamed(base.forward), "__module__": __name__}
        if base.forward in _CONVOLVE:  # not of a subclass that computes something else
            mixin = _AdaptedConvolution
            members["convolve"] = _CONVOLVE[base.forward]
        if issubclass(base, nn.Sequential):  # which calls all that it holds
            members |= {"__iter__": _layers_alone, "__len__": lambda self: len(self._modules) - 1}
            members["__getitem__"] = lambda self, index: list(self)[index]
        _CLASSES[base] = type(f"Adapted{base.__name__}", (mixin, base), members)
    return _CLASSES[base]


def _layers_alone(sequential: nn.Sequential) -> Iterator[nn.Module]:
    return (module for name, module in sequential._modules.items() if name != "deltas" and module is not None)


def convolve(self: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight; a method of adapted classes, under whose name TorchScript wants the function."""
    return self._conv_forward(x, weight, self.bias)


def _transposed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method for each number of dimensions, for which TorchScript has no common name."""

    def convolve(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        rest = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return function(x, weight, self.bias, *rest)

    return convolve


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_CONVOLVE: dict[Callable, Callable[..., Tensor]] = {
    nn.Conv1d.forward: convolve,
    nn.Conv2d.forward: convolve,
    nn.Conv3d.forward: convolve,
    nn.ConvTranspose1d.forward: _transposed(F.conv_transpose1d),
    nn.ConvTranspose2d.forward: _transposed(F.conv_transpose2d),
    nn.ConvTranspose3d.forward: _transposed(F.conv_transpose3d),
}


def _blank(base: type[nn.Module]) -> nn.Module:
    """An adapted module without content, for copying and unpickling."""
    adapted = _adapted_class(base)
    return adapted.__new__(adapted)


def _has_one_input(base: type[nn.Module]) -> bool:
    """Whether forward takes the input alone; the output size of transposed convolutions, which networks do not give, aside."""
    names = [name for name in inspect.signature(base.forward).parameters if name not in ("self", "output_size")]
    return len(names) == 1


def _renamed(forward: Callable) -> Callable:
    """TorchScript names a method after its function; two called ``forward`` would clash."""
    if not isinstance(forward, types.FunctionType):
        return forward
    copy = types.FunctionType(
        forward.__code__, forward.__globals__, "base_forward", forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__, copy.__annotations__ = forward.__kwdefaults__, forward.__annotations__
    return copy
