"""What a method is: the seam by which LoRA and its like reach a network."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

__all__ = ["Method", "kinds"]


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


def kinds(methods: Sequence[Method]) -> str:
    """The methods by the names of their classes."""
    return " and ".join(type(method).__name__ for method in methods) or "no method"
