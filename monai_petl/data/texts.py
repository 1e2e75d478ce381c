"""Texts that come with data, in the encodings in which systems write them."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from monai_petl.data.errors import DataError

__all__ = ["decoded", "read_json"]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file in UTF-8 or UTF-16, as Windows writes it; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        contents = json.loads(decoded(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}. Save it as UTF-8 text") from error
    if not isinstance(contents, dict):
        raise DataError(f"{path} must hold a JSON object, got a {type(contents).__name__}")
    return contents


def decoded(path: Path) -> str:
    """A text in UTF-8, or in UTF-16 or UTF-32 with its mark.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
    """
    data = path.read_bytes()
    return data.decode(_encoding(data[:4]))


def _encoding(first: bytes) -> str:
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"}
    marks |= {codecs.BOM_UTF16_BE: "utf-16"}
    return next((name for mark, name in marks.items() if first.startswith(mark)), "utf-8")
