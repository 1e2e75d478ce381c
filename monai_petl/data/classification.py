"""Data lists for classification: which images a data set holds, of which class, and in which section.

Three layouts are read. *A table*: ``labels.csv`` with the columns ``file`` (or ``image``, ``path``), ``class_name`` (or
``class``, ``label``) and, where they are known, ``split`` (or ``section``) and ``group`` (or ``patient``: images that belong
together). *Class folders*: ``training/benign/*.png``, ``validation/...``, ``test/...``, or ``benign/*.png`` alone. *Decathlon*:
a ``dataset.json`` whose cases have an ``image`` and the name or number of a class as their ``label``. Without sections the
images are split 70/10/20 by seed, class by class, and groups stay together.

With several labels an image: in a table the names of all its classes with ``|`` between them (nothing for none), or a column of
0 and 1 for each class; in a ``dataset.json`` a list of names or numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from monai_petl.data.class_table import require_names
from monai_petl.data.datalist import SECTIONS, split_cases
from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.few_shot import require_disjoint
from monai_petl.data.image_json import read_image_json
from monai_petl.data.image_table import read_table, section_of
from monai_petl.data.pictures import is_image, is_picture, read_picture
from monai_petl.data.said import say_once, summarised
from monai_petl.data.texts import read_json

__all__ = ["image_classes", "load_image_list", "require_images"]

ImageCase = dict[str, Any]
TABLE, OTHER_TABLES = "labels.csv", (".tsv", ".xls", ".xlsx", ".ods")
SYSTEM = ("thumbs.db", "desktop.ini")


def load_image_list(
    dataset_dir: PathLike,
    section: str = "training",
    class_names: Sequence[str] = (),
    *,
    multi_label: bool = False,
    seed: int = 1,
) -> list[ImageCase]:
    """Lists the images of one section as ``{"image": path, "label": number, "class_name": name, "group": text}``.

    With ``multi_label`` the label is a row of zeros and ones, (K,), and the class name joins those of its classes by ``|``.

    Args:
        dataset_dir: the data set's folder; where it is absent the list is empty, so that a bundle can be built without data.
        section: ``"training"``, ``"validation"`` or ``"test"``.
        class_names: the classes, whose places are the labels 0, 1, ...; default those of :func:`image_classes`.
        multi_label: whether an image may have several classes, or none.
        seed: seed of the split, where one is drawn.

    Raises:
        ValueError: the section is unknown.
        DataError: the table or ``dataset.json`` cannot be read, or an image's class is none of ``class_names``.
    """
    if section not in SECTIONS:
        raise ValueError(f"section must be one of {', '.join(SECTIONS)}, got {section!r}")
    names = require_names(class_names)
    cases = _cases(Path(dataset_dir), names if multi_label else None)
    names = names or _ordered(cases)
    strange = sorted({name for case in cases for name in case["classes"]} - set(names))
    if strange:
        first = next(case["image"] for case in cases if strange[0] in case["classes"])
        raise DataError(
            f"{dataset_dir} has images of the class {strange[0]!r}, such as {first}, which is none of the classes "
            f"{', '.join(names)}; give all of them as class_names"
        )
    if any(case["section"] is None for case in cases):
        class_of = {case["group"]: (*case["classes"], "")[0] for case in reversed(cases)}  # of its first image
        strata = {name: [case for case in cases if class_of[case["group"]] == name] for name in (*names, "")}
        chosen = split_cases(strata, seed, lambda case: case["group"])[section]
    else:
        chosen = [case for case in cases if case["section"] == section]
    return [
        {
            "image": case["image"],
            "label": _row(case["classes"], names) if multi_label else names.index(case["classes"][0]),
            "class_name": "|".join(name for name in names if name in case["classes"]),
            "group": case["group"],
        }
        for case in chosen
    ]


def _row(classes: Sequence[str], names: Sequence[str]) -> np.ndarray:
    return np.array([name in classes for name in names], dtype=np.float32)


def image_classes(dataset_dir: PathLike) -> list[str]:
    """Names of a data set's classes, in order of their numbers where it has any, else of their names.

    Raises:
        DataError: as :func:`load_image_list`.
    """
    return _ordered(_cases(Path(dataset_dir)))


def require_images(
    datalist: Sequence[Mapping[str, Any]],
    dataset_dir: PathLike,
    class_names: Sequence[str] = (),
    validation: Sequence[Mapping[str, Any]] = (),
    images: str | None = None,
    intensity_window: Sequence[float] = (),
) -> None:
    """Stops with a clear sentence before anything is trained or predicted. To be called first in a bundle's ``run``.

    Pictures are read as in training, by all processors, since a header does not tell whether the rest is there: one of 512 x
    512 pixels takes a processor about 1 ms as JPEG and 4 ms as PNG.

    Args:
        datalist: what :func:`load_image_list` gave, or cases with an ``image`` alone.
        dataset_dir: the folder it was read from.
        class_names: classes of which there has to be an image.
        validation: further images.
        images: the pattern of file names that they were found by, where it was not the folder.
        intensity_window: black and white of the transforms that follow. Pictures are read from 0 to 255, whatever their bits.

    Raises:
        DataError: the list is empty, a class has no image, a file is missing or no image, the two lists share images or
            groups, or the window is not meant for pictures.
    """
    class_names = require_names(class_names)
    remedy = "Give the data set's folder as --dataset_dir; docs/data.md describes its layout."
    if images is not None and not datalist:
        raise DataError(f"no file matches images={images!r}; give a pattern such as 'folder/*.png', in quotes")
    if images is None and not Path(dataset_dir).is_dir():
        raise DataError(f"dataset_dir names no folder: {dataset_dir}. {remedy}")
    if not datalist:
        raise DataError(f"no images were found in dataset_dir {dataset_dir}. {remedy}")
    found = {name for case in datalist for name in str(case.get("class_name", "")).split("|") if name}
    empty = [name for name in class_names if name not in found]
    if empty:
        known = ", ".join(sorted(map(str, found)))
        raise DataError(f"no image in {dataset_dir} is of the class {', '.join(empty)}; found: {known}")
    paths = [Path(case["image"]) for case in (*datalist, *validation)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} images that {dataset_dir} lists are not there, first {missing[0]}")
    pictures = [path for path in paths if is_picture(path)]
    if pictures and intensity_window and max(intensity_window) > 255:
        raise DataError(
            f"intensity_window is {list(intensity_window)}, but pictures such as {pictures[0]} are read from 0 to 255, "
            "those of 16 bits too; leave intensity_window out"
        )
    with ThreadPoolExecutor() as threads:  # decoders let go of Python's lock
        flaws = list(tqdm(threads.map(_flaw, paths), "images", len(paths), leave=False, disable=None))
    bad = [f"{path} {flaw}" for path, flaw in zip(paths, flaws, strict=True) if flaw]
    if bad:
        more = f". {len(bad) - 1} more of the {len(paths)} images cannot be used" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}")
    require_disjoint({"training": datalist, "validation": validation})
    rows = [case["label"] for case in validation if np.ndim(case.get("label", 0))]
    if rows and len(rows[0]) < 2:
        raise DataError("one class with multi_label is a yes or no: name two classes, and leave multi_label out")
    if rows and not (np.any(rows, 0) & ~np.all(rows, 0)).any():
        raise DataError(
            f"no class has images with it and without it among the {len(rows)} for validation, so no model can be "
            "chosen by them; give others, or none"
        )


def _flaw(path: Path) -> str:
    """Why a file cannot be read; nothing if it can."""
    try:
        read_picture(path)
    except DataError as error:
        return str(error)
    return ""


def _cases(root: Path, several: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Every image with its classes by name, number (if any), section (if any) and group.

    Args:
        root: the data set's folder.
        several: names of classes of which an image may have several; nothing where it has one.
    """
    table, contents = _table_of(root), read_json(root / "dataset.json")
    if table:
        cases = read_table(table, several)
    elif contents:
        cases = read_image_json(root / "dataset.json", contents, several is not None)
    elif root.is_dir():
        cases = _from_sections(root)
    else:
        return []
    _say_unread(root, {case["image"] for case in cases})
    return cases


def _table_of(root: Path) -> Path | None:
    """``labels.csv`` in any case; nothing where there is none.

    Raises:
        DataError: there are several.
    """
    names = [entry for entry in sorted(root.iterdir()) if entry.is_file()] if root.is_dir() else []
    tables = [entry for entry in names if entry.name.lower() == TABLE]
    if len(tables) > 1:
        raise DataError(f"{root} has the tables {' and '.join(entry.name for entry in tables)}; keep one of them")
    return tables[0] if tables else None


def _from_sections(root: Path) -> list[dict[str, Any]]:
    """Class folders, in folders of sections where there are any; what lies beside those is left out."""
    sections = {folder: section_of(folder.name) for folder in _folders(root)}
    nested = any(name and _folders(folder) for folder, name in sections.items())
    if nested or "training" in sections.values() or (sections and all(sections.values())):
        return [case for folder, name in sections.items() if name for case in _from_folders(folder, name)]
    return _from_folders(root, None)


def _from_folders(root: Path, section: str | None) -> list[dict[str, Any]]:
    return [
        {"image": str(file), "classes": (folder.name,), "number": None, "section": section, "group": str(file)}
        for folder in _folders(root)
        for file in sorted(folder.iterdir())
        if is_image(file) and file.is_file() and not file.name.startswith(".")
    ]


def _folders(root: Path) -> list[Path]:
    """Folders of sections or classes; not those that archives and systems leave."""
    return sorted(
        folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith((".", "__MACOSX"))
    )


def _say_unread(root: Path, read: set[str]) -> None:
    """One line for the files that are in the folder and in no list, and one for folders without any."""
    used = {os.path.normpath(image) for image in read}
    filled = {os.path.dirname(image) for image in used}
    unread, empty = [], []
    for current, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(current, name)
            if os.path.normpath(path) not in used and name.lower() not in (TABLE, "dataset.json"):
                unread.append(f"{os.path.relpath(path, root)} ({_why_unread(path, name)})")
        links = {name for name in folders if os.path.islink(os.path.join(current, name))}
        unread += [
            f"{os.path.relpath(os.path.join(current, name), root)} (a link to a folder)"
            for name in sorted(links)
            if os.path.normpath(os.path.join(current, name)) not in filled
        ]
        if not folders and not files and os.path.normpath(current) != os.path.normpath(root):
            empty.append(os.path.relpath(current, root))
    if unread:
        say_once(f"{len(unread)} files of {root} are not read: {summarised(unread)}")
    if empty:
        say_once(f"{len(empty)} folders of {root} are empty, and give no class: {summarised(empty)}")


def _why_unread(path: str, name: str) -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return "a link to nothing"
    if "__MACOSX" in path or name.startswith("._") or name.lower() in SYSTEM:
        return "left by an operating system"
    if name.startswith("."):
        return "hidden"
    if name.lower().endswith(OTHER_TABLES):
        return f"a table; save it as {TABLE}"
    return "in no list and no folder of a class" if is_image(name) else "no ending of an image"


def _ordered(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    numbers = {
        name: case["number"] if len(case["classes"]) == 1 else None for case in cases for name in case["classes"]
    }
    last = float("inf")

    def place(name: str) -> tuple[float, float, str]:
        number = numbers[name]
        return last if number is None else number, int(name) if name.isdigit() else last, name

    return sorted(numbers, key=place)
