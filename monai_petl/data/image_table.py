"""Tables of images with their classes, as ``labels.csv``."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_petl.data.datalist import SECTIONS, decoded, path_in
from monai_petl.data.errors import DataError
from monai_petl.data.folders import say_once

__all__ = ["read_table", "section_of"]

FILE, CLASS, SECTION, GROUP = (
    ("file", "image", "path"),
    ("class_name", "class", "label"),
    ("split", "section"),
    ("group", "patient"),
)
ALIASES = {"train": "training", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}
SEPARATORS = (",", ";", "\t")  # as spreadsheets write them


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
        return []
    columns = _columns(path, header, rows, several)
    cases = [_case(path, line, row, columns, several) for line, row in rows]
    _require_agreement(path, cases)
    for case in cases:
        del case["line"]
    return cases


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
    lines = [line for line in text.splitlines() if line.strip()]
    separator = max(SEPARATORS, key=(lines[0] if lines else "").count)
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    found: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                found.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {path} cannot be read as a table: {error}") from None
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
    others = [column for column in header if column not in read]
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
        "line": line,
    }


def _number(cell: str) -> int | None:
    """A class number, which spreadsheets may have turned into 1.0."""
    whole = cell.removesuffix(".0")
    return int(whole) if whole.isdigit() else None


def _require_agreement(path: Path, cases: Sequence[dict[str, Any]]) -> None:
    """An image has one class and one section, and a class one number."""
    images: dict[str, dict[str, Any]] = {}
    numbers: dict[Any, dict[str, Any]] = {}
    for case in cases:
        first = images.setdefault(case["image"], case)
        for key, what in (("classes", "of the class"), ("section", "in the section"), ("group", "of the group")):
            if case[key] != first[key]:
                said = ["|".join(c[key]) if key == "classes" else c[key] for c in (first, case)]
                raise DataError(
                    f"lines {first['line']} and {case['line']} of {path} contradict each other: {case['image']} is {what} "
                    f"{said[0]!r} and {said[1]!r}"
                )
        if case["number"] is None or len(case["classes"]) != 1 or case["classes"][0] == str(case["number"]):
            continue
        for key in (case["classes"][0], case["number"]):
            other = numbers.setdefault(key, case)
            if (other["classes"], other["number"]) != (case["classes"], case["number"]):
                raise DataError(
                    f"lines {other['line']} and {case['line']} of {path} contradict each other: label {other['number']} is "
                    f"{other['classes'][0]!r} and label {case['number']} is {case['classes'][0]!r}"
                )


def _is_one(cell: str | None, name: str, where: str) -> bool:
    if (cell or "") not in ("0", "1", "0.0", "1.0", ""):
        raise DataError(f"{where} has {cell!r} for the class {name!r}; give 1 where the image is of the class, else 0")
    return (cell or "").startswith("1")
