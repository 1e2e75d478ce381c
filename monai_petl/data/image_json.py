"""Lists of images with their classes in the form of the Decathlon: ``dataset.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_petl.data.datalist import SECTIONS, path_in
from monai_petl.data.errors import DataError
from monai_petl.data.image_table import require_agreement, section_of, without_copies
from monai_petl.data.said import say_once

__all__ = ["read_image_json"]

ABOUT = ("labels", "name", "description", "reference", "licence", "license", "release", "tensorImageSize", "modality")
COUNTS = ("numTraining", "numTest", "numValidation", "file_ending", "channel_names", "version")


def read_image_json(path: Path, contents: Mapping[str, Any], several: bool) -> list[dict[str, Any]]:
    """Every image of the file with its classes by name, number (if any), section and group.

    Args:
        path: of the file; images are relative to its folder.
        contents: what is in it.
        several: whether an image may have several classes, as a list of their names or numbers.

    Raises:
        DataError: naming the case: it has no image or class, a class that ``labels`` lacks, or contradicts another case.
    """
    names = _names(path, contents.get("labels", {}))
    cases = []
    unknown = [key for key in contents if not section_of(key) and key not in (*ABOUT, *COUNTS)]
    if unknown:
        say_once(f"{path}: the entries {', '.join(map(repr, unknown))} are no sections and are not read")
    for section in SECTIONS:
        for key in (key for key in contents if section_of(key) == section):
            if not isinstance(contents[key], list):
                raise DataError(f"{key!r} of {path} must be a list of cases, got {contents[key]!r}")
            for place, item in enumerate(contents[key], 1):
                case = _case(path, item, names, several)
                cases.append({**case, "section": section, "where": f"case {place} of {key!r}"})
    require_agreement(path, cases)
    return without_copies(path, cases)


def _names(path: Path, labels: object) -> dict[str, str]:
    """Number -> name, from ``{"0": "normal"}`` or ``{"normal": 0}``."""
    if not isinstance(labels, Mapping):
        raise DataError(f"'labels' of {path} must map numbers to names, such as {{'0': 'normal'}}, got {labels!r}")
    pairs = [(str(number), str(name)) for number, name in labels.items()]
    if pairs and not any(number.isdigit() for number, _ in pairs):
        pairs = [(number, name) for name, number in pairs]
    names = dict(pairs)
    if len(names) < len(pairs) or len({*names.values()}) < len(names):
        raise DataError(f"'labels' of {path} gives a name or a number twice: {dict(labels)!r}")
    return names


def _case(path: Path, item: object, names: Mapping[str, str], several: bool) -> dict[str, Any]:
    if (
        not isinstance(item, Mapping)
        or not isinstance(item.get("image"), str)
        or item.get("label") is None
        or (isinstance(item["label"], list) and not several)
    ):
        raise DataError(f"each case in {path} needs an image and the label of one class, got {item!r}")
    given = item["label"] if isinstance(item["label"], list) else [item["label"]]
    classes = [_class(path, label, item["image"], names) for label in given]
    if len({*classes}) < len(classes):
        raise DataError(
            f"{path} has the label {given} for {item['image']}; give the names or numbers of the image's classes, each once"
        )
    numbers = {name: number for number, name in names.items()}
    number = numbers.get(classes[0], classes[0]) if len(classes) == 1 else ""
    return {
        "image": path_in(path.parent, item["image"]),
        "classes": tuple(classes),
        "number": int(number) if number.isdigit() else None,
        "group": str(item.get("group", item["image"])),
    }


def _class(path: Path, label: object, image: str, names: Mapping[str, str]) -> str:
    """The class that a name or a number means."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    text = str(label)
    if isinstance(label, bool | float | Sequence | Mapping) and not isinstance(label, str):
        raise DataError(f"{path} has the label {label!r} for {image}; give the name or the whole number of its class")
    if names and text not in names and text not in names.values():
        known = ", ".join(f"{number} ({name})" for number, name in names.items())
        raise DataError(f"{path} has the label {text!r} for {image}, which is none of its 'labels': {known}")
    return names.get(text, text)
