"""From an exception to the sentence that a user needs: what was wrong below the layers that pass it on."""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import traceback
from types import TracebackType

__all__ = ["SHOW_TRACEBACK", "is_refusal", "root_cause", "say_errors_last", "sentence_of"]

SHOW_TRACEBACK = "MONAI_PETL_TRACEBACK"  # environment variable
REFUSALS = (ValueError, OSError, KeyError, TypeError)
_PASSED_ON = re.compile(r"\n\n(?:The above exception was|During handling of the above)")
_FROM_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process")


def root_cause(error: BaseException) -> BaseException:
    """What was raised inside a config, below the ``RuntimeError`` that MONAI wraps it in."""
    cause = error
    while type(cause) is RuntimeError and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    return cause


def sentence_of(error: BaseException) -> str:
    """What an error says, in one line, without the wrappers of configs, transforms and data workers."""
    cause = root_cause(error)
    text = str(cause.args[0]) if isinstance(cause, KeyError) and cause.args else str(cause)
    if _FROM_WORKER.search(text):
        text = _first_of_worker(text)
    text = " ".join(text.split()) or type(cause).__name__
    made = _component(error)
    return f"{text} (in {made}: check the values that it gets)" if made and not is_refusal(error) else text


def is_refusal(error: BaseException) -> bool:
    """Whether the error is about what the user gave, and its sentence all that is needed: no fault of a program."""
    cause = root_cause(error)
    if _FROM_WORKER.search(str(cause)):
        return _kind_of(error) in _names_of_refusals()
    if not isinstance(cause, REFUSALS):
        return False
    return not isinstance(cause, TypeError) or _raised_by_us(cause)


def say_errors_last() -> None:
    """End a Python process that an error stops with its sentence as the last line, ``DataError: ...`` for instance.

    What a user can mend is that sentence alone; anything else shows Python's traceback first. Set the environment variable
    ``MONAI_PETL_TRACEBACK`` to see the traceback in both cases. Bundles call this in ``initialize``, since
    ``python -m monai.bundle run`` ends with "Failed to instantiate" in place of the reason.
    """
    sys.excepthook = _sentence_last


def _sentence_last(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return
    if os.environ.get(SHOW_TRACEBACK):
        traceback.print_exception(kind, error, trace)
    elif is_refusal(error):
        print(f"(set {SHOW_TRACEBACK}=1 to see where this was raised)", file=sys.stderr)
    else:
        traceback.print_exception(kind, error, trace)
    print(f"{_kind_of(error)}: {sentence_of(error)}", file=sys.stderr, flush=True)
    if threading.active_count() > 1:
        _leave()


def _leave() -> None:
    """End without taking Python apart: threads that still load images would abort the process with a line of their own."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _kind_of(error: BaseException) -> str:
    """The class of the error, in a data worker too."""
    cause = root_cause(error)
    raised = re.match(r"(?:\w+\.)*(\w+): ", _raised_in_worker(str(cause))) if _FROM_WORKER.search(str(cause)) else None
    return raised[1] if raised else type(cause).__name__


def _component(error: BaseException) -> str:
    """The innermost component or expression of a config that failed."""
    found, cause = "", error
    while type(cause) is RuntimeError and isinstance(cause.__cause__, Exception):
        named = re.search(r"instantiate component '([\w.]+)' with keywords: ([\w,]+)", str(cause))
        expression = re.search(r'ConfigExpression: \s*"(\$.*)"', str(cause))
        if named:
            found = f"{named[1].rpartition('.')[2]}({named[2].replace(',', ', ')})"
        elif expression:
            found = re.sub(r"__local_refs\['(.*?)'\]", r"@\1", expression[1])
        cause = cause.__cause__
    return found


def _names_of_refusals() -> set[str]:
    """Names of the refusals and of the classes below them, of this package too."""
    found, names = list(REFUSALS), set()
    while found:
        kind = found.pop()
        names.add(kind.__name__)
        found += kind.__subclasses__()
    return names - {"TypeError"}


def _raised_in_worker(text: str) -> str:
    """``Kind: message`` of the first exception in the traceback that a data worker sent as text."""
    first = _PASSED_ON.split(text)[0]
    lines = first.rstrip().splitlines()
    frames = [place for place, line in enumerate(lines) if line.startswith("  ")]
    return "\n".join(lines[frames[-1] + 1 :]) if frames else first


def _first_of_worker(text: str) -> str:
    message = re.sub(r"^[\w.]+: ", "", _raised_in_worker(text), count=1)
    return message.strip("'\"") if message else text


def _raised_by_us(error: BaseException) -> bool:
    """Whether this package said it, and not Python of a wrong call."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "monai_petl" in frames[-1].filename and "raise " in (frames[-1].line or "")
