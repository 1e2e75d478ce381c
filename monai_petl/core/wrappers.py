"""Networks in a wrapper: compiled, or spread over devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["on_plain", "refuse_wrappers", "unwrapped"]

Function = TypeVar("Function", bound=Callable[..., Any])

INSIDE = {"OptimizedModule": "_orig_mod"}  # of torch.compile
SHARDED = ("FullyShardedDataParallel", "FSDP")


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``: its names stand in files."""
    while True:
        if isinstance(network, DataParallel | DistributedDataParallel):
            network = network.module
        elif type(network).__name__ in INSIDE:
            network = getattr(network, INSIDE[type(network).__name__])
        else:
            return network


def on_plain(function: Function) -> Function:
    """Call a function of a network with the network inside its wrapper; where it returns a network, that is the given one."""

    @functools.wraps(function)
    def call(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = function(unwrapped(network), *args, **kwargs)
        return network if isinstance(result, nn.Module) else result

    return cast(Function, call)


def refuse_wrappers(network: nn.Module) -> None:
    """Refuse to attach where the wrapper would not see what is added, or where its name would stand in files.

    Raises:
        ValueError: says in which order to do it.
    """
    outer: nn.Module | None = network
    while outer is not None:
        if isinstance(outer, DistributedDataParallel) or type(outer).__name__ in SHARDED:
            raise ValueError(
                f"this network is wrapped in {type(outer).__name__} already, which shares the gradients of the parameters "
                "that it has seen. Adapt the network first, then wrap it"
            )
        inside = (
            outer.module
            if isinstance(outer, DataParallel)
            else getattr(outer, INSIDE.get(type(outer).__name__, ""), None)
        )
        outer = inside if isinstance(inside, nn.Module) else None
    for name, module in unwrapped(network).named_modules():
        if name and unwrapped(module) is not module:
            raise ValueError(
                f"{name} is wrapped in {type(module).__name__}, whose name would stand in adapter files and fit no plain "
                "network. Adapt the network first, then compile or wrap its parts, or compile in place by module.compile()"
            )
