"""Data lists for bundles: which volumes a data set holds, in which section, and under which names its classes go.

Two layouts are read. *Decathlon*: a ``dataset.json`` that lists the cases. *Plain folders*: ``images/`` and ``labels/``
(or ``imagesTr/`` and ``labelsTr/``) with equal file names, split 70/10/20 by seed as in M. Fischer et al., "Prompt
Tuning for Parameter-efficient Medical Image Segmentation", arXiv 2211.09233. Reading a folder that is absent gives an
empty list, so that a bundle can be built without data; :func:`require_data` is what a bundle's ``run`` begins with.
"""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from monai_petl.data.class_table import class_names, require_names
from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.folders import list_volumes, stem
from monai_petl.data.said import say_once, summarised
from monai_petl.data.texts import read_json
from monai_petl.files.atomic import partial_folder, write_text

__all__ = [
    "SECTIONS",
    "DataError",
    "class_names",
    "few_shot",
    "load_datalist",
    "new_dataset_folder",
    "require_data",
    "require_names",
    "split_cases",
    "write_dataset_json",
]

logger = logging.getLogger(__name__)

SECTIONS = ("training", "validation", "test")

Case = dict[str, str]
T = TypeVar("T")


def load_datalist(
    dataset_dir: PathLike, section: str = "training", *, seed: int = 1, subject_pattern: str | None = None
) -> list[Case]:
    """Lists the cases of one section as ``{"image": path, "label": path}``, paths joined to the folder.

    With a ``dataset.json`` its sections are taken as they stand; when it has no ``validation``, one training case in
    eight is set aside for it (so the lists never overlap). Entries of ``test`` may be plain strings: they have no
    ``label`` then. In plain folders the cases that have both an image and a label are split by :func:`split_cases`;
    ``imagesTs/`` is the test section where it exists; images without any folder of labels are all test cases.

    Args:
        dataset_dir: the data set's folder.
        section: ``"training"``, ``"validation"`` or ``"test"``.
        seed: seed of the split, where one is drawn.
        subject_pattern: regular expression searched in file names; its first group (or whole match) is the subject, and
            all cases of a subject stay in one section. Default: each case is a subject.

    Returns:
        the cases, in order of the file or of their names; empty when the folder is absent or holds none.

    Raises:
        ValueError: when the section is unknown.
        DataError: when ``dataset.json`` cannot be read.

    Example, in a bundle's configuration::

        "imports": ["$from monai_petl.data import load_datalist"],
        "datalist": "$load_datalist(@dataset_dir, 'training')"
    """
    if section not in SECTIONS:
        raise ValueError(f"section must be one of {', '.join(SECTIONS)}, got {section!r}")
    root = Path(dataset_dir)

    def subject_of(case: Case) -> str:
        return match_name(stem(case["image"]), subject_pattern)

    contents = read_json(root / "dataset.json")
    unread = left_out(root)
    if unread:
        say_once(f"{len(unread)} files of {root} are not read: {summarised(unread)}")
    if _lists_cases(contents):
        sections = {name: [_entry(root, item) for item in _cases_of(root, contents, name)] for name in SECTIONS}
        if "validation" not in contents:
            sections["training"], sections["validation"] = _set_aside(sections["training"], 8, seed, subject_of)
    else:
        sections = _sections_of_plain_folders(root, seed, subject_of)
    return sections[section]


def split_cases(
    groups: Mapping[str, Sequence[T]], seed: int = 1, subject_of: Callable[[T], str] = str
) -> dict[str, list[T]]:
    """Splits cases 70/10/20 into training, validation and test, source by source.

    One subject in five goes to test, then one in eight of the rest to validation, both rounded up: 43 and 47 cases of
    two sources give 61/10/19. A source of one subject is training only. The draw depends on the names and the seed
    alone, not on the order of the lists.

    Args:
        groups: source -> its cases.
        seed: seed of the draw.
        subject_of: subject of a case; the cases of a subject stay together.

    Returns:
        ``{"training": [...], "validation": [...], "test": [...]}``.
    """
    split: dict[str, list[T]] = {section: [] for section in SECTIONS}
    for cases in groups.values():
        rest, test = _set_aside(cases, 5, seed, subject_of)
        training, validation = _set_aside(rest, 8, seed, subject_of)
        for section, part in zip(SECTIONS, (training, validation, test), strict=True):
            split[section] += part
    return split


def few_shot(datalist: Sequence[T], count: int | None, seed: int = 0) -> list[T]:
    """Draws ``count`` cases. Draws of one seed are nested: the 3 cases lie among the 10.

    Args:
        datalist: cases to draw from; an empty one gives an empty draw, so that a bundle can be built without data.
        count: number of cases, None for all.
        seed: seed of the draw.

    Raises:
        ValueError: when count is not positive.
        DataError: when the list is shorter than that.
    """
    if count is None:
        return list(datalist)
    if count < 1:
        raise ValueError(f"count must be positive, or None for all cases, got {count}")
    if datalist and count > len(datalist):
        raise DataError(
            f"{count} cases were asked for, but the data list holds {len(datalist)}; give a smaller number (in a bundle: "
            "num_labelled), or none for all"
        )
    chosen = np.random.default_rng(seed).permutation(len(datalist))[:count]
    return [datalist[index] for index in sorted(chosen)]


def require_data(
    datalist: Sequence[Mapping[str, object]],
    dataset_dir: PathLike,
    classes: Iterable[str] = (),
    label_ids: Mapping[str, int] | None = None,
) -> None:
    """Stops with a clear sentence when there is nothing to train or test on. To be called first in a bundle's ``run``.

    Args:
        datalist: what :func:`load_datalist` gave, or cases from elsewhere.
        dataset_dir: the folder it was read from.
        classes: names that the data set has to know.
        label_ids: name -> label value; default: those of the folder.

    Raises:
        DataError: when the list is empty or a class is unknown.
    """
    remedy = "Give the data set's folder as --dataset_dir; docs/data.md describes its layout."
    root = Path(dataset_dir)
    if not datalist and not root.is_dir():
        raise DataError(f"dataset_dir names no folder: {root}. {remedy}")
    if not datalist:
        raise DataError(f"no cases were found in dataset_dir {root}. {remedy}")
    known = class_names(root) if label_ids is None else label_ids
    unknown = [name for name in require_names(classes) if name not in known]
    if unknown:
        names = ", ".join(known) or "not named"
        raise DataError(f"dataset_dir {root} has no class named {', '.join(unknown)}; its classes are {names}")


@contextmanager
def new_dataset_folder(out: PathLike) -> Iterator[Path]:
    """Gives a temporary folder beside ``out`` that takes its name at the end, and is removed if anything goes wrong.

    Raises:
        FileExistsError: when ``out`` holds files, or is one.
        OSError: when the folder cannot be made.
    """
    target = Path(out).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder. Choose another output folder or remove it.")
    with ExitStack() as stack:
        try:
            partial = stack.enter_context(partial_folder(target)) / target.name
            partial.mkdir()
        except OSError as error:
            raise OSError(
                f"cannot write the output folder {target}: {error.strerror}. Choose a writable place."
            ) from error
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)


def write_dataset_json(
    folder: Path,
    sections: Mapping[str, Sequence[Mapping[str, str]]],
    classes: Mapping[str, int],
    *,
    name: str,
    modality: str,
) -> None:
    """Writes ``dataset.json`` in the Decathlon's form; ``sections`` hold paths relative to the folder."""
    contents = {
        "name": name,
        "tensorImageSize": "3D",
        "modality": {"0": modality},
        "labels": {"0": "background", **{str(value): label for label, value in classes.items()}},
        "numTraining": len(sections["training"]),
        "numTest": len(sections["test"]),
        **{section: list(sections[section]) for section in SECTIONS},
    }
    write_text(folder / "dataset.json", json.dumps(contents, indent=4) + "\n", "the data list")


def unpaired_files(root: Path) -> list[Path]:
    """Volumes in plain folders that have no partner; with a ``dataset.json`` that lists cases there are none."""
    contents = read_json(root / "dataset.json")
    part = _plain_part(root)
    if _lists_cases(contents) or not (root / f"labels{part}").is_dir():
        return []
    return _pair_files(root / f"images{part}", root / f"labels{part}")[1]


def _lists_cases(contents: Mapping[str, Any]) -> bool:
    """nnU-Net's ``dataset.json`` names classes and channels, and leaves the cases to the folders."""
    return "training" in contents or "test" in contents


def match_name(name: str, pattern: str | None) -> str:
    """The part of a name that a regular expression finds: its first group that took part, else the whole match.

    Without a pattern, or where it finds nothing, the name itself.
    """
    found = re.search(pattern, name) if pattern else None
    if found is None:
        return name
    return next((group for group in found.groups() if group is not None), found[0])


def left_out(root: Path) -> list[str]:
    """What lies in the data set's folders and is read by nobody, with the reason."""
    contents = read_json(root / "dataset.json")
    listed = {
        os.path.realpath(path) for case in _listed(root, contents) for path in (case["image"], case.get("label", ""))
    }
    found: list[str] = []
    for name in sorted({"images", "labels", "imagesTr", "labelsTr", "imagesTs", "labelsTs"}):
        listing = list_volumes(root / name, channels=name.startswith("images"))
        found += listing.left_out
        if listed:
            found += [
                f"{path.relative_to(root)} (not in dataset.json)"
                for path in listing.volumes.values()
                if os.path.realpath(path) not in listed
            ]
    return found


def _listed(root: Path, contents: Mapping[str, Any]) -> list[Case]:
    return [_entry(root, item) for name in SECTIONS for item in _cases_of(root, contents, name)]


def _cases_of(root: Path, contents: Mapping[str, Any], section: str) -> list[Any]:
    cases = contents.get(section, [])
    if not isinstance(cases, list):
        raise DataError(f"{section} in {root / 'dataset.json'} must be a list of cases, got {type(cases).__name__}")
    return cases


def _sections_of_plain_folders(root: Path, seed: int, subject_of: Callable[[Case], str]) -> dict[str, list[Case]]:
    part = _plain_part(root)
    if not (root / f"labels{part}").is_dir():
        volumes = list_volumes(root / f"images{part}", channels=True).volumes.values()
        return {"training": [], "validation": [], "test": [{"image": str(path)} for path in volumes]}
    cases, alone = _pair_files(root / f"images{part}", root / f"labels{part}")
    if alone:
        names = summarised([str(path.relative_to(root)) for path in alone])
        say_once(f"{len(alone)} files of {root} have no partner of that name and are left out: {names}")
    if not (root / "imagesTs").is_dir():
        return split_cases({"": cases}, seed, subject_of)
    training, validation = _set_aside(cases, 8, seed, subject_of)
    labelled = {case["image"]: case for case in _pair_files(root / "imagesTs", root / "labelsTs")[0]}
    paths = map(str, list_volumes(root / "imagesTs", channels=True).volumes.values())
    test = [labelled.get(path, {"image": path}) for path in paths]
    return {"training": training, "validation": validation, "test": test}


def _pair_files(images: Path, labels: Path) -> tuple[list[Case], list[Path]]:
    """Pairs the volumes of two folders by file name; returns the pairs and the files without a partner.

    An image may carry nnU-Net's channel ending, ``case_0000.nii.gz`` for ``case.nii.gz``.
    """
    first, second = list_volumes(images, channels=True).volumes, list_volumes(labels).volumes
    both = sorted(first.keys() & second.keys())
    alone = [path for side in (first, second) for name, path in side.items() if name not in both]
    return [{"image": str(first[name]), "label": str(second[name])} for name in both], sorted(alone)


def _plain_part(root: Path) -> str:
    return "Tr" if (root / "imagesTr").is_dir() else ""


def _set_aside(cases: Sequence[T], one_in: int, seed: int, subject_of: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """Draws one subject in ``one_in``, rounded up; returns the cases of the others and of the drawn, in given order."""
    subjects = sorted({subject_of(case) for case in cases})
    count = -(-len(subjects) // one_in) if len(subjects) > 1 else 0
    drawn = {subjects[index] for index in np.random.default_rng(seed).permutation(len(subjects))[:count]}
    return [c for c in cases if subject_of(c) not in drawn], [c for c in cases if subject_of(c) in drawn]


def _entry(root: Path, item: Any) -> Case:
    entry = {"image": item} if isinstance(item, str) else dict(item) if isinstance(item, Mapping) else {}
    wrong = [key for key in ("image", "label") if key in entry and not isinstance(entry[key], str)]
    if not isinstance(entry.get("image"), str) or wrong:
        raise DataError(
            f"each case in {root / 'dataset.json'} needs the path of one image and of one label at most, got {item!r}"
        )
    return {key: path_in(root, value) if key in ("image", "label") else value for key, value in entry.items()}


def path_in(root: Path, value: str) -> str:
    """A path of a list, joined to its folder; with Windows' separators and another Unicode form where only that is there."""
    path = os.path.normpath(root / value)
    if os.path.exists(path):
        return path
    others = [os.path.normpath(root / value.replace("\\", "/"))]
    others += [unicodedata.normalize(form, other) for form in ("NFC", "NFD") for other in (path, others[0])]
    return next((other for other in others if os.path.exists(other)), path)
