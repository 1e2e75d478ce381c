"""Weights of an adapted network from files: a trained network whole, or an adapter on the backbone it was trained on."""

from __future__ import annotations

import logging
import os
from typing import TypeVar

from torch import Tensor, nn

from monai_petl.core.adapters import load_adapter
from monai_petl.core.method import kinds
from monai_petl.core.records import adapters_of
from monai_petl.core.switching import remove_adapter
from monai_petl.weights.state_files import read_state_dict

__all__ = ["load_trained"]

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


def load_trained(
    network: Network,
    path: str | os.PathLike | None,
    adapter_path: str | os.PathLike | None = None,
    instead_of: str | os.PathLike | None = None,
) -> Network:
    """Load a trained network: from its own file, or as an adapter on the backbone whose weights it has already.

    Args:
        network: changed in place; adapted by the method that the file was trained with, when it is a whole network.
        path: state dict of the whole network; not read when there is an adapter. ``None`` leaves the weights.
        adapter_path: the adapter's file, which knows its method: that takes the place of the network's own, with a warning
            when it is another one.
        instead_of: a missing file in whose place ``path`` is read, for a warning.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit; names the tensors.
    """
    if adapter_path is not None:
        prepared = [method for record in adapters_of(network).values() for method in record.methods]
        for name in list(adapters_of(network)):
            remove_adapter(network, name)
        load_adapter(network, adapter_path)
        trained = [method for record in adapters_of(network).values() for method in record.methods]
        if kinds(prepared) != kinds(trained):
            logger.warning(
                "%s was trained with %s, which takes the place of %s; give its method, if it is not meant to",
                adapter_path,
                kinds(trained),
                kinds(prepared),
            )
        return network
    if path is None:
        return network
    state = read_state_dict(path, "Run the bundle's train.json first, or give its place as --ckpt_path")
    own = network.state_dict()
    wrong = [n for n in own if not isinstance(state.get(n), Tensor) or state[n].shape != own[n].shape]
    wrong += [n for n in state if n not in own]
    if wrong:
        raise ValueError(
            f"{path} does not fit this {type(network).__name__}: {len(wrong)} tensors are missing, left over or of another "
            f"shape ({', '.join(wrong[:3])}). Use the method and the network settings that the file was trained with"
        )
    network.load_state_dict(state)
    if instead_of is not None:
        logger.warning("there is no file at %s; the network goes on from %s", instead_of, path)
    return network
