"""A function as a command: its options come from its signature, their help from its docstring."""

from __future__ import annotations

import argparse
import difflib
import inspect
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from fire.parser import DefaultParseValue

__all__ = ["Command"]

EXTRAS = {"report": ("filelock", "jinja2", "pandas")}
TEXT = (str, Path, os.PathLike)


@dataclass(frozen=True)
class Command:
    """One verb.

    Attributes:
        place: ``"module:function"``, which is imported when the verb is used.
        help: what it does, in one line.
        extra: the extra that it needs, if any.
        logs: whether progress is told by the library's log.
    """

    place: str
    help: str
    extra: str = ""
    logs: bool = False

    def run(self, name: str, words: Sequence[str]) -> Any:
        """Call the function with what the words of a command line say.

        Args:
            name: the command up to here, for messages.
            words: the rest of the command line.

        Raises:
            SystemExit: 0 after ``--help``; 2 after a wrong option, with one sentence on the standard error.
            ValueError: a package of the extra is missing.
        """
        self._require_extra()
        if self.logs:
            logging.basicConfig(level=logging.INFO, format="%(message)s")
        call = self._function()
        parser, parameters = _parser(call, name, self.help)
        taken, rest = _pull_named(parser, parameters, words)
        for action in [action for action in parser._actions if action.dest in taken]:
            parser._remove_action(action)  # given by its name, so not wanted by its place
        given = {**vars(parser.parse_args(rest)), **taken}
        many = next((p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
        return call(*given.pop(many, ()), **given) if many else call(**given)

    def parameters(self) -> dict[str, inspect.Parameter]:
        """What the function takes, by name."""
        return dict(inspect.signature(self._function()).parameters)

    def _function(self) -> Callable[..., Any]:
        module, _, function = self.place.partition(":")
        return getattr(import_module(module), function)

    def _require_extra(self) -> None:
        missing = [package for package in EXTRAS.get(self.extra, ()) if find_spec(package) is None]
        if missing:
            raise ValueError(
                f"this needs {' and '.join(missing)}; install the extra {self.extra!r}: pip install "
                f"'monai-petl[{self.extra}]', or in a checkout: python -m pip install --constraint constraints.txt "
                f"--editable '.[{self.extra}]'"
            )


class _Parser(argparse.ArgumentParser):
    """One sentence in place of the usage."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^the following arguments are required", "missing", message)
        message = re.sub(r"^unrecognized arguments:", "unknown option or one value too many:", message)
        found = re.search(r"(--[\w-]+)", message) if message.startswith("unknown") else None
        known = [option for action in self._actions for option in action.option_strings if "_" not in option[2:]]
        near = difflib.get_close_matches(found[1].replace("_", "-"), known, 1) if found else []
        hint = f"; did you mean {near[0]}?" if near else f"; {self.prog} --help lists the options"
        sys.stderr.write(f"error: {message}{hint}\n")
        sys.exit(2)


def _parser(call: Callable[..., Any], name: str, text: str) -> tuple[_Parser, dict[str, inspect.Parameter]]:
    parameters = dict(inspect.signature(call).parameters)
    hints, explained = typing.get_type_hints(call), _argument_help(call)
    parser = _Parser(name, description=text, allow_abbrev=False, formatter_class=_Page)
    for parameter in parameters.values():
        convert = _converter(hints.get(parameter.name, Any))
        about = explained.get(parameter.name, "").replace("%", "%%")
        if parameter.kind is parameter.VAR_POSITIONAL:
            parser.add_argument(parameter.name, nargs="+", type=convert, help=about)
        elif parameter.kind is parameter.VAR_KEYWORD:
            parser.epilog = f"Any other --name VALUE: {about}"
        elif parameter.default is parameter.empty:
            parser.add_argument(parameter.name, metavar=parameter.name.upper(), type=convert, help=about)
        elif isinstance(parameter.default, bool):
            action = argparse.BooleanOptionalAction if parameter.default else "store_true"
            about = f"do not {about}" if parameter.default else about
            parser.add_argument(*_spellings(parameter.name), action=action, default=parameter.default, help=about)
        else:
            shown = "" if parameter.default in (None, "", ()) else f" (default: {parameter.default})"
            parser.add_argument(
                *_spellings(parameter.name),
                metavar="VALUE",
                type=convert,
                default=parameter.default,
                help=about + shown.replace("%", "%%"),
            )
    return parser, parameters


class _Page(argparse.HelpFormatter):
    """Shows each option under one spelling."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--no-{action.dest}"
        return action.option_strings[0] + ("" if action.nargs == 0 else f" {action.metavar}")


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _pull_named(
    parser: _Parser, parameters: dict[str, inspect.Parameter], words: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Take out what is given as ``--name value`` and is no option: required arguments, and ids of a bundle."""
    options = {option for action in parser._actions for option in action.option_strings}
    types_of = {action.dest: action.type for action in parser._actions if not action.option_strings}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken: dict[str, Any] = {}
    rest, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        mine = word.startswith("--") and word.partition("=")[0] not in options and (name in types_of or takes_any)
        if not mine or not name.isidentifier():
            rest.append(word)
            if word in options and queue and not _is_flag(parser, word):
                rest.append(queue.pop(0))
            continue
        if not equals:
            value = queue.pop(0) if queue and not queue[0].startswith("--") else "True"
        convert: Any = types_of.get(name) or DefaultParseValue
        taken[name] = convert(value)
    return taken, rest


def _is_flag(parser: _Parser, option: str) -> bool:
    return next(action.nargs == 0 for action in parser._actions if option in action.option_strings)


def _converter(hint: Any) -> Callable[[str], Any]:
    """How a word of the command line becomes a value of this type."""
    options = set(typing.get_args(hint)) - {types.NoneType} if _is_union(hint) else {hint}
    if options <= {str, Path, os.PathLike} or all(_is_path(option) for option in options):
        return str
    if len(options) == 1 and next(iter(options)) in (int, float):
        return next(iter(options))
    if all(typing.get_origin(option) is Sequence and typing.get_args(option) == (str,) for option in options):
        return _names
    return DefaultParseValue


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_path(option: Any) -> bool:
    return option in TEXT or typing.get_origin(option) is os.PathLike


def _names(text: str) -> list[str]:
    """Names that are given as ``a,b,c`` or as a list."""
    value = DefaultParseValue(text) if text.lstrip().startswith(("[", "(")) else text.split(",")
    return [str(name).strip() for name in value]


def _argument_help(call: Callable[..., Any]) -> dict[str, str]:
    """Name -> text of the section ``Args:`` of a docstring, in one line."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(call) or "", re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for names, text in re.findall(
        r"^    (\*{0,2}\w[\w, *]*): (.*?)(?=^    \S|\Z)", section[1] if section else "", re.MULTILINE | re.DOTALL
    ):
        for name in names.split(","):
            found[name.strip(" *")] = _plain(text)
    return found


def _plain(text: str) -> str:
    """Without the marks of reStructuredText, in one line."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split()))
    return text.replace("``", "")
