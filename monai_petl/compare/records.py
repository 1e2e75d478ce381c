"""Files of records: JSON that appears whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_petl.files.atomic import write_text
from monai_petl.files.json_files import read_object, require_fields

__all__ = ["read_record", "require_record", "write_record"]

REMEDY = "Delete it, and its run is made again"
NUMBER = (int, float)
RUN: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "shots": (int, type(None)),
    "seed": (int,),
    "status": (str,),
    "ids": (dict,),
    "section": (str,),
}
DONE: dict[str, tuple[type, ...]] = {
    "metric": (str,),
    "quality": (*NUMBER, type(None)),
    "cases": (dict,),
    "factor": NUMBER,
    "steps": (int,),
    "versions": (dict,),
    "date": (str,),
}


def read_record(path: Path) -> dict[str, Any]:
    """What :func:`write_record` wrote of a run.

    Raises:
        ValueError: the file is damaged; names it and what is wrong.
    """
    found = read_object(path, REMEDY)
    require_record(path, found, REMEDY)
    return found


def require_record(path: Path, found: Any, remedy: str) -> None:
    """Refuse what is no record of a run: the file, what it holds, and what to do then.

    Raises:
        ValueError: naming the file and the value.
    """
    require_fields(path, {"run": found}, {"run": (dict,)}, remedy)
    require_fields(
        path, {"run_seconds": 0, **found}, {**RUN, "run_seconds": NUMBER}, remedy
    )  # older ones do not say it
    if found["status"] != "done":
        return
    require_fields(path, found, DONE, remedy)
    if not all(isinstance(score, int | float | None) for score in found["cases"].values()):
        raise ValueError(f"{path} is damaged: the scores of its cases must be numbers. {remedy}")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record so that it appears whole or not at all; what is not finite becomes ``null``."""
    write_text(path, json.dumps(_finite(record), indent=1) + "\n", "the record")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
