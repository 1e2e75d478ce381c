"""Data lists for classification: which images a data set holds, of which class, and in which section.

Three layouts are read. *A table*: ``labels.csv`` with the columns ``file`` (or ``image``, ``path``), ``class_name`` (or
``class``, ``label``) and, where they are known, ``split`` (or ``section``) and ``group`` (or ``patient``: images that belong
together). *Class folders*: ``training/benign/*.png``, ``validation/...``, ``test/...``, or ``benign/*.png`` alone. *Decathlon*:
a ``dataset.json`` whose cases have an ``image`` and the name or number of a class as their ``label``. Without sections the
images are split 70/10/20 by seed, class by class, and groups stay together.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from monai_petl.data.datalist import SECTIONS, DataError, PathLike, _read_json, split_cases

__all__ = ["balancing_weights", "few_shot_per_class", "image_classes", "load_image_list", "require_images"]

ImageCase = dict[str, Any]
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
IMAGE_SUFFIXES = (*PICTURES, ".nii", ".nii.gz", ".dcm", ".npy")
FILE, CLASS, SECTION, GROUP = (
    ("file", "image", "path"),
    ("class_name", "class", "label"),
    ("split", "section"),
    ("group", "patient"),
)
ALIASES = {"train": "training", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}


def load_image_list(
    dataset_dir: PathLike, section: str = "training", class_names: Sequence[str] = (), *, seed: int = 1
) -> list[ImageCase]:
    """Lists the images of one section as ``{"image": path, "label": number, "class_name": name, "group": text}``.

    Args:
        dataset_dir: the data set's folder; where it is absent the list is empty, so that a bundle can be built without data.
        section: ``"training"``, ``"validation"`` or ``"test"``.
        class_names: the classes, whose places are the labels 0, 1, ...; default those of :func:`image_classes`.
        seed: seed of the split, where one is drawn.

    Raises:
        ValueError: the section is unknown.
        DataError: the table or ``dataset.json`` cannot be read, or an image's class is none of ``class_names``.
    """
    if section not in SECTIONS:
        raise ValueError(f"section must be one of {', '.join(SECTIONS)}, got {section!r}")
    cases = _cases(Path(dataset_dir))
    names = list(class_names) or _ordered(cases)
    strange = sorted({case["class_name"] for case in cases} - set(names))
    if strange:
        first = next(case["image"] for case in cases if case["class_name"] == strange[0])
        raise DataError(
            f"{dataset_dir} has images of the class {strange[0]!r}, such as {first}, which is none of the classes "
            f"{', '.join(names)}; give all of them as class_names"
        )
    if any(case["section"] is None for case in cases):
        class_of = {case["group"]: case["class_name"] for case in reversed(cases)}  # of its first image
        strata = {name: [case for case in cases if class_of[case["group"]] == name] for name in names}
        chosen = split_cases(strata, seed, lambda case: case["group"])[section]
    else:
        chosen = [case for case in cases if case["section"] == section]
    return [
        {"image": c["image"], "label": names.index(c["class_name"]), "class_name": c["class_name"], "group": c["group"]}
        for c in chosen
    ]


def image_classes(dataset_dir: PathLike) -> list[str]:
    """Names of a data set's classes, in order of their numbers where it has any, else of their names.

    Raises:
        DataError: as :func:`load_image_list`.
    """
    return _ordered(_cases(Path(dataset_dir)))


def few_shot_per_class(datalist: Sequence[ImageCase], count: int | None, seed: int = 0) -> list[ImageCase]:
    """Draws ``count`` images of each class. Draws of one seed are nested: the 1 image lies among the 5.

    Images of one group (a patient, near copies) are drawn after all other groups of the class have given one.

    Args:
        datalist: what :func:`load_image_list` gave.
        count: images of each class, None for all.
        seed: seed of the draw.

    Raises:
        ValueError: when count is not positive.
        DataError: when a class has fewer; names it.
    """
    if count is None:
        return list(datalist)
    if count < 1:
        raise ValueError(f"count must be positive, or None for all images, got {count}")
    there = Counter(case["class_name"] for case in datalist)
    short = {name: number for name, number in there.items() if number < count}
    if short:
        raise DataError(
            f"{count} images of each class were asked for, but there are {', '.join(f'{v} of {k}' for k, v in short.items())}; "
            "give a smaller number (in a bundle: num_labelled), or none for all"
        )
    drawn: set[int] = set()
    for label in sorted({case["label"] for case in datalist}):
        places = [place for place, case in enumerate(datalist) if case["label"] == label]
        shuffled = [places[i] for i in np.random.default_rng([seed, label]).permutation(len(places))]
        turn: Counter[str] = Counter()
        ranked = []
        for place in shuffled:
            ranked.append((turn[datalist[place]["group"]], place))
            turn[datalist[place]["group"]] += 1
        drawn |= {place for _, place in sorted(ranked, key=lambda pair: pair[0])[:count]}
    return [case for place, case in enumerate(datalist) if place in drawn]


def balancing_weights(datalist: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each image 1 / (images of its class): weights of a sampler that draws all classes equally often."""
    count = Counter(case["label"] for case in datalist)
    return [1.0 / count[case["label"]] for case in datalist]


def require_images(
    datalist: Sequence[Mapping[str, Any]],
    dataset_dir: PathLike,
    class_names: Sequence[str] = (),
    validation: Sequence[Mapping[str, Any]] = (),
    images: str | None = None,
) -> None:
    """Stops with a clear sentence before anything is trained or predicted. To be called first in a bundle's ``run``.

    Args:
        datalist: what :func:`load_image_list` gave, or cases with an ``image`` alone.
        dataset_dir: the folder it was read from.
        class_names: classes of which there has to be an image.
        validation: further images.
        images: the pattern of file names that they were found by, where it was not the folder.

    Raises:
        DataError: the list is empty, a class has no image, or a file is missing or no image.
    """
    remedy = "Give the data set's folder as --dataset_dir; docs/data.md describes its layout."
    if images is not None and not datalist:
        raise DataError(f"no file matches images={images!r}; give a pattern such as 'folder/*.png', in quotes")
    if images is None and not Path(dataset_dir).is_dir():
        raise DataError(f"dataset_dir names no folder: {dataset_dir}. {remedy}")
    if not datalist:
        raise DataError(f"no images were found in dataset_dir {dataset_dir}. {remedy}")
    found = {case.get("class_name") for case in datalist}
    empty = [name for name in class_names if name not in found]
    if empty:
        known = ", ".join(sorted(map(str, found)))
        raise DataError(f"no image in {dataset_dir} is of the class {', '.join(empty)}; found: {known}")
    paths = [Path(case["image"]) for case in (*datalist, *validation)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} images that {dataset_dir} lists are not there, first {missing[0]}")
    bad = [path for path in paths if path.name.lower().endswith(PICTURES) and not _is_picture(path)]
    if bad:
        raise DataError(
            f"{len(bad)} files are no images that can be read, first {bad[0]}; repair them or take them out"
        )


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.verify()
    except Exception:  # Pillow raises whatever its decoders do
        return False
    return True


def _cases(root: Path) -> list[dict[str, Any]]:
    """Every image with its class by name, number (if any), section (if any) and group."""
    if (root / "labels.csv").is_file():
        return _from_table(root / "labels.csv")
    contents = _read_json(root / "dataset.json")
    if contents:
        return _from_json(root, contents)
    if not root.is_dir():
        return []
    sections = {folder: _section(folder.name) for folder in _folders(root)}
    if sections and all(sections.values()):
        return [case for folder, name in sections.items() for case in _from_folders(folder, name)]
    return _from_folders(root, None)


def _from_table(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from error
    columns = list(rows[0]) if rows else []
    file_column, class_column = _column(columns, FILE), _column(columns, CLASS)
    if rows and not (file_column and class_column):
        raise DataError(
            f"{path} needs a column {' or '.join(FILE)} and a column {' or '.join(CLASS)}; it has {', '.join(columns)}"
        )
    section_column, group_column = _column(columns, SECTION), _column(columns, GROUP)
    cases = []
    for line, row in enumerate(rows, 2):
        if not row[file_column] or not row[class_column]:
            raise DataError(f"line {line} of {path} has no file or no class")
        section = _section(row[section_column] or "") if section_column else None
        if section_column and section is None:
            raise DataError(
                f"line {line} of {path} is in the section {row[section_column]!r}; known are {', '.join(SECTIONS)}"
            )
        number = row.get("label") or ""
        cases.append(
            {
                "image": str(path.parent / row[file_column]),
                "class_name": row[class_column],
                "number": int(number) if number.isdigit() else None,
                "section": section,
                "group": row[group_column] if group_column and row[group_column] else row[file_column],
            }
        )
    return cases


def _from_json(root: Path, contents: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {str(number): str(name) for number, name in dict(contents.get("labels", {})).items()}
    numbers = {name: number for number, name in names.items()}
    cases = []
    for section in SECTIONS:
        for item in contents.get(section, []):
            if (
                not isinstance(item, Mapping)
                or not {"image", "label"} <= item.keys()
                or isinstance(item["label"], list)
            ):
                raise DataError(
                    f"each case in {root / 'dataset.json'} needs an image and the label of one class, got {item!r}"
                )
            label = numbers.get(str(item["label"]), str(item["label"]))
            cases.append(
                {
                    "image": str(root / str(item["image"])),
                    "class_name": names.get(label, label),
                    "number": int(label) if label.isdigit() else None,
                    "section": section,
                    "group": str(item.get("group", item["image"])),
                }
            )
    return cases


def _from_folders(root: Path, section: str | None) -> list[dict[str, Any]]:
    return [
        {"image": str(file), "class_name": folder.name, "number": None, "section": section, "group": str(file)}
        for folder in _folders(root)
        for file in sorted(folder.iterdir())
        if file.name.lower().endswith(IMAGE_SUFFIXES) and not file.name.startswith(".")
    ]


def _folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _ordered(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    numbers = {case["class_name"]: case["number"] for case in cases}
    last = float("inf")
    return sorted(numbers, key=lambda name: (last if numbers[name] is None else numbers[name], name))


def _section(name: str) -> str | None:
    known = ALIASES.get(name.lower(), name.lower())
    return known if known in SECTIONS else None


def _column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)
