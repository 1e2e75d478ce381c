"""The layers that a network's output comes from, found by running it: the head of a network that nobody has described.

From each output the graph of autograd is followed back, through activations, norms, resizing and reshaping, to the first
linear layer or convolution on each way. Deep supervision has outputs in training alone, so both modes are looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from monai_petl.core.frozen import acts_in_training
from monai_petl.core.roles import CONVOLUTIONS, TRANSPOSED, used_modules

__all__ = ["example_inputs", "output_layers", "runs_on"]

logger = logging.getLogger(__name__)

LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
SIZES = (32, 64, 96, 128, 16, 224, 256)  # voxels or pixels along each axis, in the order in which they are tried
TRIED = 3 * 128 * 128  # values of an image, up to which larger ones are tried when training mode takes none


def output_layers(network: nn.Module, example: Sequence[Tensor] | None = None) -> tuple[list[str], tuple[Tensor, ...]]:
    """Names of the linear layers and convolutions that the output comes from, in the network's order, and what it was run on.

    Args:
        network: it is run in evaluation and in training mode; nothing of it changes.
        example: what it takes. Default: noise of the sizes that its first layer and its attributes tell.

    Returns:
        Nothing where no input is found that the network takes.
    """
    names = {
        id(m.weight): n for n, m in used_modules(network) if isinstance(m, LAYERS) and "deltas" not in n.split(".")
    }
    both: list[tuple[tuple[Tensor, ...], list[Tensor], list[Tensor] | None]] = []
    for inputs in [tuple(example)] if example is not None else example_inputs(network):
        output = runs_on(network, inputs)
        if output is None:
            continue
        trained = runs_on(network, inputs, training=True)
        both.append((inputs, output, trained))
        if trained is not None or inputs[0].numel() > TRIED:
            break
    if not both:
        return [], ()
    inputs, output, trained = both[-1] if both[-1][2] is not None else both[0]
    if trained is None:
        logger.warning(
            "%s could not be run in training mode, so its head is that of evaluation", type(network).__name__
        )
    found = {name for leaf in (*output, *(trained or ())) for name in _sources(leaf, names)}
    return [name for name, _ in network.named_modules() if name in found], inputs


def runs_on(network: nn.Module, inputs: Sequence[Any], training: bool = False) -> list[Tensor] | None:
    """The outputs of a pass with gradients for all parameters, losses aside; ``None`` when it fails.

    In training mode, what acts otherwise there (norms, codebooks) stays in evaluation, as it does once it is frozen; what the
    network itself changes is put back.
    """
    modes = [(module, module.training) for module in network.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in network.buffers()] if training else []
    try:
        for module, _ in modes:
            module.training = training and (module is network or not acts_in_training(module))
        network.requires_grad_(True)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            leaves = tree_leaves(network(*inputs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim and leaf.grad_fn is not None]
    except Exception:  # whatever a network raises when it is given a size that is not its own
        return None
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for buffer, before in buffers:
            buffer.detach().copy_(before)


def example_inputs(network: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Single images that the network may take, (1, C, *spatial) or (1, features), the likely ones first."""
    layers = [module for _, module in used_modules(network) if isinstance(module, LAYERS)]
    if not layers:
        return
    place = layers[0].weight.device
    shapes: list[tuple[int, ...]] = [(layers[0].in_features,)] if isinstance(layers[0], nn.Linear) else []
    convolutions: list[Any] = [layer for layer in layers if not isinstance(layer, nn.Linear)]
    dims = len(convolutions[0].kernel_size) if convolutions else getattr(network, "spatial_dims", 0)
    told = [getattr(network, name, None) for name in ("in_channels", "n_input_channels", "in_chans")]
    channels = [count for count in told if isinstance(count, int)]
    if convolutions:
        channels += [convolutions[0].in_channels, min(layer.in_channels for layer in convolutions)]
    sizes = [own for own in [_own_size(network, dims)] if own]
    sizes += [(extent,) * dims for extent in SIZES if dims and extent**dims <= 128**3]
    shapes += [(count, *size) for count in dict.fromkeys(channels) for size in sizes]
    for shape in shapes:
        with torch.random.fork_rng(devices=[]):
            yield (torch.randn(1, *shape, device=place),)


def _own_size(network: nn.Module, dims: int) -> tuple[int, ...]:
    """The size of images that a network was built for, from its attributes or its patches."""
    for name in ("img_size", "image_size", "input_image_size"):
        own = getattr(network, name, None)
        if isinstance(own, int) and dims:
            return (own,) * dims
        if isinstance(own, Sequence) and own and all(isinstance(extent, int) for extent in own):
            return tuple(own)
    patches: Any = next((m for m in network.modules() if hasattr(m, "n_patches") and hasattr(m, "patch_size")), None)
    if patches is None:
        return ()
    side = round(patches.n_patches ** (1 / len(tuple(patches.patch_size))))
    return tuple(side * int(extent) for extent in patches.patch_size)


def _sources(output: Tensor, names: dict[int, str]) -> set[str]:
    """The named layers nearest to an output in its graph."""
    found: set[str] = set()
    seen: set[Any] = set()
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        weights = [names[key] for key in _weights(node) if key in names]
        if weights:
            found.update(weights)
        else:
            todo += [below for below, _ in node.next_functions]
    return found


def _weights(node: Any) -> Iterator[int]:
    """Ids of the parameters that an operation takes, directly or turned (a linear layer takes its weight transposed)."""
    for below, _ in node.next_functions:
        for _ in range(3):
            if below is None:
                break
            if hasattr(below, "variable"):
                yield id(below.variable)
                break
            if below.name() not in (
                "TBackward0",
                "TransposeBackward0",
                "PermuteBackward0",
                "ViewBackward0",
                "ToCopyBackward0",
            ):
                break
            below = below.next_functions[0][0] if below.next_functions else None
