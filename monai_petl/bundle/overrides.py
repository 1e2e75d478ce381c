"""What the command line of ``python -m monai.bundle run`` changes in a config: ids that exist, and values of their kind.

MONAI takes any ``--name value``: a misspelt id is added to the config, where nothing reads it, and the run goes on without it.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

__all__ = ["check_overrides"]

OF_RUN = {"run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file"}
NUMBER = (int, float)


def check_overrides(words: Sequence[str] | None = None) -> None:
    """Stop before anything is built when the command line names an id that the configs do not have, or a value of another kind.

    Bundles call it in ``initialize``. Where a config is run from Python, there is no command line and nothing to check.

    Args:
        words: the command line behind ``python -m monai.bundle run``. Default: that of this process.

    Raises:
        ValueError: an id is unknown, with the nearest names; or a text is given for a number or a list of names, or a fraction
            for a whole number.
    """
    if words is None:
        words = sys.argv[2:] if Path(sys.argv[0]).parent.name == "bundle" and sys.argv[1:2] == ["run"] else ()
    given = dict(_named(words))
    files = given.get("config_file")
    if "args_file" in given and Path(str(given["args_file"])).is_file():
        listed = json.loads(Path(str(given["args_file"])).read_text(encoding="utf-8"))
        files = files or listed.get("config_file")
    if not files:
        return
    config = ConfigParser.load_config_files(files)
    known = {name.lstrip("+~") for name in config}
    known |= DEFAULT_MLFLOW_SETTINGS["configs"].keys() if "tracking" in given else set()
    for name, value in given.items():
        if name in OF_RUN:
            continue
        top, *inside = name.lstrip("+~").replace("#", "::").split("::")
        if not name.startswith(("+", "~")):
            _require(name, top, known)
            section = config.get(top)
            if inside and isinstance(section, Mapping) and "_target_" not in section:  # train and validate
                _require(name, f"{top}::{inside[0]}", {f"{top}::{key}" for key in section})
        _check_kind(name, _found(config.get(top), inside), value)


def _require(name: str, id: str, known: Collection[str]) -> None:
    if id not in known:
        near = difflib.get_close_matches(id, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the ids are: {', '.join(sorted(known))}"
        raise ValueError(f"the config has no id {id!r}, which --{name} would set; {hint}")


def _check_kind(name: str, default: Any, value: Any) -> None:
    """A text that is an expression or a reference can become anything, and so can what is ``null`` in the config."""
    if isinstance(value, str) and value.startswith(("$", "@", "%")):
        return
    if isinstance(default, bool):
        right, wanted = isinstance(value, bool | int), "True or False"
    elif isinstance(default, int):
        right, wanted = isinstance(value, bool | int | None), "a whole number"
    elif isinstance(default, float):
        right, wanted = isinstance(value, bool | int | float | None), "a number"
    elif isinstance(default, list) and default and all(isinstance(item, str) for item in default):
        right, wanted = not isinstance(value, str), f"a list of names, such as \"['{value}']\""
    elif isinstance(default, list) and default and all(isinstance(item, NUMBER) for item in default):
        right, wanted = not isinstance(value, str), f"numbers, such as {default}"
    else:
        return
    if not right:
        raise ValueError(f"--{name} must be {wanted}; got {value!r}")


def _named(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """``--name value``, ``--name=value`` and ``--flag``, as fire reads them."""
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = queue.pop(0) if queue and not queue[0].startswith("--") else "True"
        yield name.replace("-", "_"), DefaultParseValue(value)


def _found(content: Any, inside: Sequence[str]) -> Any:
    for part in inside:
        if isinstance(content, Mapping):
            content = content.get(part)
        elif isinstance(content, list) and part.isdigit() and int(part) < len(content):
            content = content[int(part)]
        else:
            return None
    return content
