"""The network of a bundle's folder, with the weights of its ``models/model.pt``."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from torch import nn

from monai_petl.weights.trained import load_trained

__all__ = ["is_bundle", "network_of_bundle"]

CONFIGS, NETWORKS = ("inference", "train", "evaluate"), ("network_def", "network")


def is_bundle(path: str | os.PathLike) -> bool:
    """Whether this is a folder with ``configs/metadata.json``."""
    return (Path(path) / "configs" / "metadata.json").is_file()


def network_of_bundle(path: str | os.PathLike, **ids: Any) -> nn.Module:
    """``network_def`` of a bundle's config, with the weights of ``models/model.pt``.

    The config's expressions are run, as ``monai.bundle`` runs them: take bundles from people whom you trust.

    Args:
        path: the bundle's folder.
        ids: of the config, and their values.

    Returns:
        The network, in evaluation mode.

    Raises:
        FileNotFoundError: there is no ``models/model.pt``.
        ValueError: no config describes a network, an id is unknown, or the weights do not fit.
    """
    root = Path(path)
    for name in CONFIGS:
        file = next((f for f in (root / "configs").glob(f"{name}.*") if f.suffix in (".json", ".yaml", ".yml")), None)
        if file is None:
            continue
        parser = ConfigParser()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that configs are code
            parser.read_config(str(file))
        found = next((id for id in NETWORKS if id in parser.get()), None)
        if found is None:
            continue
        for id, value in {"bundle_root": str(root), **ids}.items():
            if id in ids and id.split("::")[0] not in parser.get():
                raise ValueError(f"{file} has no id {id!r}; it has {', '.join(parser.get())}")
            parser[id] = value
        network = parser.get_parsed_content(found)
        return load_trained(network, root / "models" / "model.pt").eval()
    raise ValueError(
        f"no config of {root} describes a network: one of {', '.join(NETWORKS)} is needed in {', '.join(CONFIGS)}"
    )
