"""From the words of a command line to a verb, and from what it gives or raises to what is printed and the exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from monai_petl.cli.command import Command

__all__ = ["run"]

Verbs = Mapping[str, Any]  # word -> Command, or further Verbs


def run(verbs: Verbs, name: str, words: Sequence[str]) -> None:
    """Run the verb that the words name and print what it returns.

    Args:
        verbs: word -> command, or further verbs.
        name: the program.
        words: the command line without it.

    Raises:
        SystemExit: 1 with one sentence after an error that the user can mend, or where the result's ``ok`` is false; 2 after
            an unknown verb or option.
    """
    found: Any = verbs
    rest = list(words)
    while not isinstance(found, Command):
        word = rest.pop(0) if rest else "--help"
        if word in ("--help", "-h"):
            print(_page(found, name))
            return
        if word not in found:
            sys.stderr.write(f"error: {name} has no verb {word!r}; it has {', '.join(found)}\n")
            sys.exit(2)
        found, name = found[word], f"{name} {word}"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what it started ends too
    try:
        result = found.run(name, rest)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stood, if it is one that can (compare)")
    except Exception as error:
        _end(error)
    if result is not None:
        print(result)
    if not getattr(result, "ok", True):
        sys.exit(1)


def _end(error: Exception) -> None:
    from monai_petl.bundle.errors import SHOW_TRACEBACK, is_refusal, sentence_of

    if os.environ.get(SHOW_TRACEBACK) or not is_refusal(error):
        traceback.print_exc()
    sys.exit(f"error: {sentence_of(error)}")


def _page(verbs: Verbs, name: str) -> str:
    rows = [(word, _about(found)) for word, found in verbs.items()]
    width = max(len(word) for word, _ in rows) + 2
    lines = [f"usage: {name} VERB ...", "", *(f"  {word:<{width}}{about}" for word, about in rows)]
    return "\n".join([*lines, "", f"{name} VERB --help lists the options of a verb."])


def _about(found: Any) -> Any:
    return found.help if isinstance(found, Command) else ", ".join(found)
