"""Tables of images with their classes, as ``labels.csv``."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_petl.data.datalist import SECTIONS, path_in
from monai_petl.data.errors import DataError
from monai_petl.data.said import say_once, summarised
from monai_petl.data.texts import decoded

__all__ = ["read_table", "require_agreement", "section_of", "without_copies"]

FILE, CLASS, SECTION, GROUP = (
    ("file", "image", "path"),
    ("class_name", "class", "label"),
    ("split", "section"),
    ("group", "patient"),
)
ALIASES = {"train": "training", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}
SEPARATORS = (",", ";", "\t")  # as spreadsheets write them
UNSEEN = "\u200b\u2060\ufeff"  # characters of no width


@dataclass(frozen=True)
class _Columns:
    """Which column says what; ``one_each`` when each class has a column of 0 and 1."""

    file: str
    name: str | None
    section: str | None
    group: str | None
    one_each: bool


def read_table(path: Path, several: Sequence[str] | None) -> list[dict[str, Any]]:
    """Every image of a table with its classes by name, number (if any), section (if any) and group.

    Args:
        path: comma, semicolon or tab separated, UTF-8 or UTF-16; names of columns in any case.
        several: names of classes of which an image may have several; ``None`` where it has one.

    Raises:
        DataError: naming the line: it cannot be read, a row is longer or shorter than the header, says nothing, or contradicts
            another one.
    """
    header, rows = _rows(path)
    if not rows:
        raise DataError(f"{path} has no rows. It needs a header, and a row for each image")
    columns = _columns(path, header, rows, several)
    _compare_names(path, columns, rows)
    cases = [_case(path, line, row, columns, several) for line, row in rows]
    if columns.name:
        _settle_numbers(path, cases)
        _say_alike(path, cases)
    require_agreement(path, cases)
    return without_copies(path, cases)


def section_of(name: str) -> str | None:
    """The section that a word means, such as ``val``."""
    word = name.strip().lower()
    known = ALIASES.get(word, word)
    return known if known in SECTIONS else None


def _rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Header and rows with the numbers of their lines, without blanks around cells."""
    try:
        text = decoded(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a table: {error}. Save it as CSV in UTF-8") from None
    if "\0" in text:
        raise DataError(f"{path} cannot be read as a table: it holds zero bytes. Save it as CSV in UTF-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    separator = max(SEPARATORS, key=(lines[0] if lines else "").count)
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    declared = bool(lines) and re.fullmatch(r"sep=.", lines[0].strip()) is not None  # a line that Excel understands
    if declared:
        separator = lines[0].strip()[-1]
        reader = csv.reader(io.StringIO(text.partition("\n")[2]), delimiter=separator, strict=True)
    found: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                found.append((reader.line_num + declared, [_clean(cell) for cell in cells]))
    except csv.Error as error:
        raise DataError(f"line {reader.line_num + declared} of {path} cannot be read as a table: {error}") from None
    if not found:
        return [], []
    header = [_known(cell) for cell in found[0][1]]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        raise DataError(f"{path} has two columns {twice!r}; keep one of them")
    for line, cells in found[1:]:
        if len(cells) != len(header):
            raise DataError(
                f"line {line} of {path} has {len(cells)} cells, the header has {len(header)}: {separator.join(cells)[:80]!r}. "
                "Put names that contain the separator into quotes"
            )
    return header, [(line, dict(zip(header, cells, strict=True))) for line, cells in found[1:]]


def _clean(cell: str) -> str:
    return cell.strip().strip(UNSEEN).strip()


def _known(name: str) -> str:
    """A column's name as it is known, whatever its case; other names as they are."""
    lower = name.lower()
    return lower if lower in {*FILE, *CLASS, *SECTION, *GROUP} else name


def _columns(
    path: Path, header: list[str], rows: list[tuple[int, dict[str, str]]], several: Sequence[str] | None
) -> _Columns:
    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in header), None)

    file, name = first(FILE), first(CLASS)
    one_each = bool(several) and set(several or ()) <= set(header)
    if several is not None and not name and not one_each:
        missing = ", ".join(sorted({*several} - {*header}))
        raise DataError(
            f"{path} has no column {' or '.join(CLASS)}, and so needs one of 0 and 1 for each of class_names; "
            f"{f'there is none for {missing}' if missing else 'give class_names'}. It has {', '.join(header)}"
        )
    if not (file and (name or one_each)):
        raise DataError(
            f"{path} needs a column {' or '.join(FILE)} and a column {' or '.join(CLASS)}; it has {', '.join(header)}"
        )
    columns = _Columns(file, name, first(SECTION), first(GROUP), one_each)
    read = {
        file,
        columns.section,
        columns.group,
        *(several or () if one_each else (name,)),
        "label" if not one_each else "",
    }
    others = [column for column in header if column not in read and (column or any(row[column] for _, row in rows))]
    if others:
        say_once(f"{path}: the columns {', '.join(map(repr, others))} are not read")
    return columns


def _case(
    path: Path, line: int, row: dict[str, str], columns: _Columns, several: Sequence[str] | None
) -> dict[str, Any]:
    where = f"line {line} of {path}"
    if not row[columns.file] or (several is None and not row[columns.name or ""]):
        raise DataError(f"{where} has no file or no class")
    section = section_of(row[columns.section]) if columns.section else None
    if columns.section and section is None:
        raise DataError(f"{where} is in the section {row[columns.section]!r}; known are {', '.join(SECTIONS)}")
    if columns.one_each:
        classes = tuple(name for name in several or () if _is_one(row[name], name, where))
    else:
        text = unicodedata.normalize("NFC", row[columns.name or ""])
        classes = (text,) if several is None else tuple(name.strip() for name in text.split("|") if name.strip())
    return {
        "image": path_in(path.parent, row[columns.file]),
        "classes": classes,
        "number": _number(row.get("label", "")) if not columns.one_each else None,
        "section": section,
        "group": (row[columns.group] if columns.group else "") or row[columns.file],
        "where": f"line {line}",
    }


def _number(cell: str) -> int | None:
    """A class number, which spreadsheets may have turned into 1.0."""
    whole = _whole(cell)
    return int(whole) if whole.isdigit() else None


def _compare_names(path: Path, columns: _Columns, rows: list[tuple[int, dict[str, str]]]) -> None:
    """Names in the column ``label`` beside another one of classes: the same ones, or not read."""
    name = columns.name
    if not name or name == "label":
        return
    texts = [
        (line, row[name], row["label"]) for line, row in rows if row.get("label") and _number(row["label"]) is None
    ]
    if texts and not {label for _, _, label in texts} & {row[name] for _, row in rows}:
        say_once(f"{path}: the column 'label' has names other than those of {name!r}, and is not read")
        return
    for line, given, label in texts:
        if given != label:
            raise DataError(
                f"line {line} of {path} has the {name} {given!r} and the label {label!r}; keep one of the columns"
            )


def _whole(cell: str) -> str:
    """``1`` for ``1.0`` and ``1,0``; other texts as they are."""
    return re.sub(r"^(\d+)[.,]0+$", r"\1", cell)


def _settle_numbers(path: Path, cases: Sequence[dict[str, Any]]) -> None:
    """Where all classes are whole numbers, ``1.0`` is the class 1."""
    names = {name for case in cases for name in case["classes"]}
    if all(_whole(name).isdigit() for name in names) and any(_whole(name) != name for name in names):
        say_once(f"{path}: the classes {', '.join(sorted(names))} are read as whole numbers")
        for case in cases:
            case["classes"] = tuple(map(_whole, case["classes"]))


def _say_alike(path: Path, cases: Sequence[dict[str, Any]]) -> None:
    """Classes that differ in capitals alone are most often one."""
    spellings: dict[str, set[str]] = {}
    for name in {name for case in cases for name in case["classes"]}:
        spellings.setdefault(name.casefold(), set()).add(name)
    for alike in (sorted(names) for names in spellings.values() if len(names) > 1):
        say_once(f"{path} has the classes {', '.join(map(repr, alike))}, which differ in capitals alone")


def require_agreement(path: Path, cases: Sequence[dict[str, Any]]) -> None:
    """An image has one class and one section, and a class one number; ``where`` of a case is its place in the file.

    Raises:
        DataError: names two places that contradict each other.
    """
    images: dict[str, dict[str, Any]] = {}
    numbers: dict[Any, dict[str, Any]] = {}
    for case in cases:
        first = images.setdefault(os.path.realpath(case["image"]), case)
        for key, what in (("classes", "of the class"), ("section", "in the section"), ("group", "of the group")):
            if case[key] != first[key] and (key != "group" or case["image"] == first["image"]):
                said = ["|".join(c[key]) if key == "classes" else c[key] for c in (first, case)]
                raise _contradiction(path, first, case, f"{case['image']} is {what} {said[0]!r} and {said[1]!r}")
        if case["number"] is None or len(case["classes"]) != 1 or case["classes"][0] == str(case["number"]):
            continue
        for key in (case["classes"][0], case["number"]):
            other = numbers.setdefault(key, case)
            if (other["classes"], other["number"]) != (case["classes"], case["number"]):
                said = [f"label {c['number']} is {c['classes'][0]!r}" for c in (other, case)]
                raise _contradiction(path, other, case, " and ".join(said))


def _contradiction(path: Path, first: dict[str, Any], second: dict[str, Any], what: str) -> DataError:
    places = (first["where"], second["where"])
    lines = [place.removeprefix("line ") for place in places]
    said = f"lines {lines[0]} and {lines[1]}" if lines != [*places] else " and ".join(places)
    return DataError(f"{said} of {path} contradict each other: {what}")


def without_copies(path: Path, cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases without those that name an image once more, and without their places in the file."""
    kept: dict[str, dict[str, Any]] = {}
    twice: list[str] = []
    for case in cases:
        if case["image"] in kept:
            twice.append(f"{case['where']} ({os.path.basename(case['image'])})")
        kept.setdefault(case["image"], case)
    if twice:
        say_once(f"{path} lists {len(twice)} images once more, which are read once: {summarised(twice)}")
    return [{key: value for key, value in case.items() if key != "where"} for case in kept.values()]


def _is_one(cell: str | None, name: str, where: str) -> bool:
    if (cell or "") not in ("0", "1", "0.0", "1.0", ""):
        raise DataError(f"{where} has {cell!r} for the class {name!r}; give 1 where the image is of the class, else 0")
    return (cell or "").startswith("1")
