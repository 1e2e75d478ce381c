"""Inputs as they come from the field, and what becomes of each: read as it should be, or refused with a sentence.

Each file here lists the inputs of some kinds as ``INPUTS``. ``tests/test_inputs.py`` tries them all, and
``docs/input_table.py`` writes what they gave into docs/data.md; a test compares the two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from monai_petl.bundle.errors import is_refusal, sentence_of

__all__ = ["Input", "Outcome", "all_inputs", "try_input"]


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        kind: heading under which it stands in the table, such as ``"Pictures"``.
        what: the input in a few words, unique within its kind.
        check: makes the input in an empty folder, does with it what a bundle does, and asserts that the values that come out
            are the right ones. An input that is to be refused lets the library's error pass.
        refused: whether an error is the right outcome.
        says: pieces of text that the sentence has to hold: the name of the file, the values, the remedy. The sentence is the
            error's, or what was logged as a warning where the input is read.
    """

    kind: str
    what: str
    check: Callable[[Path], None]
    refused: bool = False
    says: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of an input: ``"read"`` or ``"refused"``, and the sentence that a user sees, without the folder's name."""

    result: str
    sentence: str


class _Warnings(logging.Handler):
    """Collects what is said while an input is read."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def try_input(tried: Input, folder: Path) -> Outcome:
    """Runs an input in a folder; errors other than a refusal (``ValueError``, ``OSError``) pass, failed assertions too."""
    said = _Warnings()
    logger = logging.getLogger("monai_petl")
    logger.addHandler(said)
    try:
        tried.check(folder)
        result, sentence = "read", " ".join(dict.fromkeys(said.lines))
    except (ValueError, OSError, RuntimeError) as error:
        if not is_refusal(error):
            raise
        result, sentence = "refused", sentence_of(error)
    finally:
        logger.removeHandler(said)
    return Outcome(result, sentence.replace(f"{folder}/", "").replace(str(folder), "the folder"))


def all_inputs() -> list[Input]:
    """The inputs of all files of this folder."""
    modules = sorted(module.name for module in iter_modules(__path__))
    return [tried for name in modules for tried in import_module(f"{__name__}.{name}").INPUTS]
