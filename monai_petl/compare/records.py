"""Files of records: JSON that appears whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["read_record", "write_record"]


def read_record(path: Path) -> dict[str, Any]:
    """What :func:`write_record` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record so that it appears whole or not at all; what is not finite becomes ``null``."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(_finite(record), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
