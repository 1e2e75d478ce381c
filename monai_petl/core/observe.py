"""What modules of a network see while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["observe"]


def observe(
    network: nn.Module, image: Tensor, modules: Iterable[nn.Module], read: Callable[[Any, Tensor, Tensor], Tensor]
) -> Tensor:
    """Run the network on an image without gradients, and stack what is read at each module, in the order in which they run.

    Args:
        network: put it into evaluation mode first.
        image: what it takes.
        modules: of the network; each runs once.
        read: module, its first input and its output -> a tensor, of the same shape for all.
    """
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(read(module, inputs[0], output)))
        for module in modules
    ]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)
