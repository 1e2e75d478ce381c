"""Build what a bundle's config describes, without data and without weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from monai.bundle import ConfigParser
from torch import nn

__all__ = ["choose", "is_terminal", "network_of_config"]

T = TypeVar("T")
NETWORK_IDS = ("adapted_network", "network", "network_def")


def network_of_config(config: str | os.PathLike, **overrides: Any) -> nn.Module:
    """The network of a bundle, adapted as its config says, with random weights.

    Args:
        config: a bundle's folder (``configs/train.json`` is read) or a config file.
        overrides: top-level ids and their values.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: an override is no id of the config, or no id describes a network.
    """
    path = Path(config)
    if path.is_dir():
        path = path / "configs" / "train.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config at {path}; give a bundle's folder or a config file")
    parser = ConfigParser()
    parser.read_config(str(path))
    unknown = [name for name in overrides if name not in parser.get()]
    if unknown:
        known = ", ".join(name for name in parser.get() if name != "_meta_")
        raise ValueError(f"{path} has no id {unknown[0]!r}; its ids are: {known}")
    for name, value in {"pretrained_path": None, **overrides}.items():
        if name in parser.get():
            parser[name] = value
    found = next((name for name in NETWORK_IDS if name in parser.get()), None)
    if found is None:
        raise ValueError(f"{path} describes no network; one of the ids {', '.join(NETWORK_IDS)} is needed")
    return parser.get_parsed_content(found)


def is_terminal() -> bool:
    """Whether somebody may be looking: progress bars are shown on a terminal, and not in a log."""
    return sys.stderr.isatty()


def choose(options: Mapping[str, T], name: str, of: str) -> T:
    """The option of this name.

    Args:
        options: name -> component.
        name: which one.
        of: the id that names it, for the error.

    Raises:
        ValueError: there is no such option; says which there are.

    Example, in a config::

        "loss": {
            "_target_": "monai_petl.bundle.choose", "options": "@losses", "name": "@loss_name", "of": "loss_name"
        }
    """
    if name not in options:
        raise ValueError(f"{of} must be one of {', '.join(options)}; got {name!r}")
    return options[name]
