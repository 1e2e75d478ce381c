"""JSON files that somebody may have damaged or written by hand: read, or refused in a sentence with the file's name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_object", "require_fields"]

NAMES = {str: "a text", int: "a whole number", float: "a number", dict: "a table", list: "a list", type(None): "null"}


def read_object(path: Path, remedy: str, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """The table that a JSON file holds.

    Args:
        path: the file, in UTF-8.
        remedy: what to do about a damaged file, a sentence without its full stop.
        error: what is raised then.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: (or ``error``) it is no JSON, holds no table, is too deep, or has a name twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise error(f"{path} is damaged: it is nested too deeply. {remedy}") from None
    except (ValueError, OSError) as reason:
        raise error(f"{path} is damaged: {reason}. {remedy}") from None
    if not isinstance(found, dict):
        raise error(f"{path} is damaged: it holds {_named(found)} in place of a table. {remedy}")
    return found


def require_fields(path: Path, found: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], remedy: str) -> None:
    """Refuse a table in which a value is missing or of another kind.

    Args:
        path: the file, for the error.
        found: what it holds.
        kinds: name -> types that its value may have.
        remedy: see :func:`read_object`.

    Raises:
        ValueError: naming file and value.
    """
    for name, types in kinds.items():
        if name not in found:
            raise ValueError(f"{path} is damaged: {name!r} is missing. {remedy}")
        value = found[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(NAMES[kind] for kind in types)
            raise ValueError(f"{path} is damaged: {name!r} must be {wanted}, got {_named(value)}. {remedy}")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _named(value: Any) -> str:
    return NAMES.get(type(value), type(value).__name__)
