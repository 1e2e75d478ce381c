"""What is left out is said, once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

__all__ = ["say_once", "summarised"]

logger = logging.getLogger(__name__)
_SAID: set[str] = set()


def say_once(sentence: str) -> None:
    """Log a warning, unless this process has done so already: a data list is read once a section."""
    if sentence not in _SAID:
        _SAID.add(sentence)
        logger.warning("%s", sentence)


def summarised(items: Sequence[str], most: int = 5) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
