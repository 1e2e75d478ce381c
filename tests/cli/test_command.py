"""Every verb has a page of help that lists its options with defaults; a wrong option is one sentence and exit code 2."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from monai_petl.cli import Command
from monai_petl.cli.verbs import VERBS
from tests.conftest import Run


def leaves(verbs: dict, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Command]]:
    for word, found in verbs.items():
        if isinstance(found, Command):
            yield (*words, word), found
        else:
            yield from leaves(found, (*words, word))


COMMANDS = list(leaves(VERBS))
GROUPS = [("adapter",), ("bundle",), ("data",), ()]


def code_of(run: Run, *words: object) -> object:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    return stop.value.code


@pytest.mark.parametrize(
    ("words", "command"), COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else None
)
def test_the_page_of_a_verb_lists_every_option_with_its_text_and_default(
    words: tuple[str, ...], command: Command, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(run, *words, "--help") == 0
    page = " ".join(capsys.readouterr().out.split())
    for parameter in command.parameters().values():
        if parameter.kind is parameter.VAR_KEYWORD:
            assert re.search(r"Any other --name VALUE: \w", page)
        elif parameter.default is parameter.empty:
            assert re.search(rf"\b{parameter.name}( [.A-Z]+)? [a-z.]", page, re.IGNORECASE), parameter.name
        elif isinstance(parameter.default, bool):
            assert f"--{'no-' if parameter.default else ''}{parameter.name} " in page
        else:
            assert re.search(rf"--{parameter.name} VALUE [\w(.]", page), parameter.name
            if parameter.default not in (None, "", ()):
                assert f"(default: {parameter.default})" in page
    for foreign in ("see monai_petl", "''", "``", ":func:", "Optional["):
        assert foreign not in page


@pytest.mark.parametrize("words", GROUPS, ids=" ".join)
def test_the_page_of_a_group_lists_its_verbs(words: tuple[str, ...], run: Run) -> None:
    inner = VERBS
    for word in words:
        inner = inner[word]
    for page in (run(*words), run(*words, "--help")):
        assert all(re.search(rf"^  {verb} +\w", page, re.MULTILINE) for verb in inner)


@pytest.mark.parametrize(
    ("words", "command"), COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else None
)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(
    words: tuple[str, ...], command: Command, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    takes_any = words in (("summary",), ("compare",))
    assert code_of(run, *words, *(() if takes_any else ("--foo", 1))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--help lists the options" in error or "did you mean --" in error


def test_an_unknown_verb_names_those_that_there_are(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(run, "data", "chek") == 2
    assert capsys.readouterr().err == (
        "error: python -m monai_petl data has no verb 'chek'; it has make, check, medfmc, medmnist\n"
    )


def test_a_wrong_value_names_the_option(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(run, "data", "make", "a", "b", "c", "--seed", "soon") == 2
    assert "--seed: invalid int value: 'soon'" in capsys.readouterr().err


def echo(first: str, second: object, *, names: object = None, whole: int = 3, loud: bool = False, **ids: object) -> str:
    """Give everything back.

    Args:
        first: a text.
        second: any value.
        names: any value.
        whole: a number.
        loud: a flag.
        ids: whatever else.
    """
    return repr((first, second, names, whole, loud, ids))


@pytest.mark.parametrize(
    ("words", "result"),
    [
        ("1 [2,3]", ("1", [2, 3], None, 3, False, {})),
        ("--second 2 --first a", ("a", 2, None, 3, False, {})),
        ("--epochs 4 a b --loud", ("a", "b", None, 3, True, {"epochs": 4})),
        ("a --spacing=[1.5,2] b", ("a", "b", None, 3, False, {"spacing": [1.5, 2]})),
        ("a --whole=-1 b --names x,y", ("a", "b", ("x", "y"), -1, False, {})),
        ("a b --dataset-dir here --flag", ("a", "b", None, 3, False, {"dataset_dir": "here", "flag": True})),
        ("a b --names {liver:1,spleen:[2,3]}", ("a", "b", {"liver": 1, "spleen": [2, 3]}, 3, False, {})),
    ],
)
def test_words_become_the_values_that_they_look_like(words: str, result: tuple) -> None:
    assert Command(f"{__name__}:echo", "Echo.").run("echo", words.split()) == repr(result)
