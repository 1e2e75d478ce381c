"""Files of records: JSON that appears whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_petl.atomic import write_text

__all__ = ["read_record", "write_record"]


def read_record(path: Path) -> dict[str, Any]:
    """What :func:`write_record` wrote.

    Raises:
        ValueError: the file is no record; names it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no record: {error}. Delete it, and its run is made again") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} is no record: it holds a {type(found).__name__}. Delete it, and its run is made again"
        )
    return found


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record so that it appears whole or not at all; what is not finite becomes ``null``."""
    write_text(path, json.dumps(_finite(record), indent=1) + "\n", "the record")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
