"""Cases of one test of which some are quick enough for every change, and the others run in ``make test-slow``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["slow_unless"]


def slow_unless(quick: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """The cases, marked ``slow`` where ``quick`` does not hold; a case of several arguments is a tuple."""
    found = []
    for case in cases:
        arguments = case if isinstance(case, tuple) else (case,)
        found.append(case if quick(*arguments) else pytest.param(*arguments, marks=pytest.mark.slow))
    return found
