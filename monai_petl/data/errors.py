"""The error of data that cannot be used."""

from __future__ import annotations

import os

__all__ = ["DataError", "PathLike"]

PathLike = str | os.PathLike[str]


class DataError(ValueError):
    """A data set that cannot be used as it is; the message says which file and what to do."""
