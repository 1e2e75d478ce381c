"""Checks of a data set: everything that would stop a training run, or spoil it without stopping it.

:func:`check_dataset` reads every volume and reports; the others read little and raise, so that a bundle's ``run`` can
begin with them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from tqdm import tqdm

from monai_petl.data.class_table import class_names, ignored_value
from monai_petl.data.datalist import (
    SECTIONS,
    Case,
    left_out,
    load_datalist,
    require_data,
    unpaired_files,
)
from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.few_shot import find_leaks, require_disjoint
from monai_petl.data.folders import stem
from monai_petl.data.said import summarised
from monai_petl.data.volume_files import open_volume
from monai_petl.data.volumes import array_of, count_values, grid_difference, grid_of, intensity_range, read_array

__all__ = ["CaseReport", "DatasetReport", "check_dataset", "check_images", "check_training_data", "validate_cases"]

MOST_LISTED = 20  # rows or problems printed before "and n more"


@dataclass
class CaseReport:
    """What was found in one case; sizes in voxels, spacing in mm, intensities as stored (HU for CT)."""

    section: str
    image: str
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    orientation: str = ""
    intensity: tuple[float, float] | None = None
    label_voxels: dict[int, int] = field(default_factory=dict)


@dataclass
class DatasetReport:
    """The result of :func:`check_dataset`: ``str()`` is a table, ``to_dict()`` has every case."""

    folder: str
    classes: dict[str, int]
    cases: list[CaseReport]
    problems: list[str]
    left_out: list[str] = field(default_factory=list)  # files that nobody reads, with the reason

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def to_dict(self) -> dict[str, object]:
        """All of it in types that JSON knows."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        counts = Counter(case.section for case in self.cases)
        lines = [f"{self.folder}: " + ", ".join(f"{counts[section]} {section}" for section in SECTIONS), ""]
        lines += _table(("class", "label", "cases", "share of voxels"), self._class_rows())
        measured = [case for case in self.cases if case.shape]
        if measured:
            lines += ["", *_table(("", "smallest", "largest"), _range_rows(measured))]
        if self.left_out:
            lines += ["", f"{len(self.left_out)} files are not read: {summarised(self.left_out)}"]
        if self.problems:
            shown = [f"- {problem}" for problem in self.problems[:MOST_LISTED]]
            more = len(self.problems) - len(shown)
            lines += ["", f"{len(self.problems)} problems", *shown, *([f"- and {more} more"] if more else [])]
        else:
            lines += ["", "no problems found"]
        return "\n".join(lines)

    def _class_rows(self) -> list[tuple[str, str, str, str]]:
        names = {0: "background", **{value: name for name, value in self.classes.items()}}
        voxels: Counter[int] = Counter()
        for case in self.cases:
            voxels.update(case.label_voxels)
        total = sum(voxels.values()) or 1
        return [
            (
                names.get(value, "(no name)"),
                str(value),
                str(sum(value in case.label_voxels for case in self.cases)),
                f"{100 * voxels[value] / total:.3f} %",
            )
            for value in sorted(names.keys() | voxels.keys())
        ]


def check_dataset(folder: PathLike) -> DatasetReport:
    """Reads every volume of a data set, one at a time, and reports what is in it and what is wrong with it.

    Looked for: missing and unreadable files, images that are not 3D, hold NaN or one value only, labels on another grid
    than their image or with fractions, label values without a name, voxels that nobody annotated (``ignore``), classes that no
    label holds, training cases without label, files without a partner, and cases or patients in two sections.

    Args:
        folder: a data set in one of the layouts of :func:`monai_petl.data.load_datalist`.

    Returns:
        the report; its ``problems`` are sentences that name the file, and ``ok`` says whether there are none.

    Raises:
        FileNotFoundError: when the folder does not exist.

    Example::

        report = check_dataset("my_data")
        print(report)
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    problems: list[str] = []
    unread: list[str] = []
    lists: dict[str, list[Case]] = {}
    classes: dict[str, int] = {}
    ignored = None
    try:
        lists = {section: load_datalist(root, section) for section in SECTIONS}
        problems += [f"{_short(path, root)} has no partner of that name" for path in unpaired_files(root)]
        unread = left_out(root)
        classes, ignored = class_names(root), ignored_value(root)
    except DataError as error:
        problems.append(str(error))
    todo = [(section, case) for section, cases in lists.items() for case in cases]
    if not todo and not problems:
        problems.append(f"{root} holds no cases: neither a dataset.json nor folders images and labels")
    reports = []
    for section, case in tqdm(todo, desc="checking", unit="case", disable=None):
        report, found = _check_case(section, case, root)
        reports.append(report)
        problems += found
    problems += _check_whole(todo, reports, classes, ignored, root)
    return DatasetReport(str(root), classes, reports, problems, unread)


def check_training_data(
    datalist: Sequence[Mapping[str, object]],
    dataset_dir: PathLike,
    classes: Iterable[str],
    validation: Sequence[Mapping[str, object]] = (),
    label_ids: Mapping[str, int] | None = None,
) -> None:
    """Stops before training or evaluation when the data cannot be used: the first thing in a bundle's ``run``.

    Args:
        datalist: cases to train on, or to evaluate on.
        dataset_dir: the folder they were read from.
        classes: names of the classes; each must be known to the data set and occur in a label of ``datalist``.
        validation: further cases that are read, and need not hold every class.
        label_ids: name -> label value; default: those of the folder.

    Raises:
        DataError: with a sentence for each problem: see :func:`monai_petl.data.require_data` and
            :func:`validate_cases`; a case has no label; a case, or a patient, is in both lists; no label for validation holds
            any of the classes; or a label holds voxels that nobody annotated.
    """
    classes = list(classes) if not isinstance(classes, str) else classes  # a text is refused below
    ids = class_names(dataset_dir) if label_ids is None else label_ids
    require_data(datalist, dataset_dir, classes, ids)
    alone = [str(case["image"]) for case in (*datalist, *validation) if "label" not in case]
    if alone:
        raise DataError(
            f"{alone[0]} has no label, and {len(alone)} cases in all have none; leave them out or label them"
        )
    wanted = {name: ids[name] for name in classes}
    validate_cases(datalist, wanted)
    validate_cases(validation)
    require_disjoint({"training": datalist, "validation": validation})
    _require_any_class(validation, wanted)
    _refuse_ignored([*datalist, *validation], dataset_dir)


def _require_any_class(validation: Sequence[Mapping[str, object]], wanted: Mapping[str, int]) -> None:
    """Without any class in any label, every network scores 0 and the first would be kept as the best."""
    values = set(wanted.values())
    if validation and values and not any(values & _values(str(case["label"])) for case in validation):
        raise DataError(
            f"none of the {len(validation)} labels for validation holds any of the classes {', '.join(wanted)}, so the "
            "best network cannot be told; put cases that have them into the section validation, or none at all"
        )


def _refuse_ignored(cases: Sequence[Mapping[str, object]], dataset_dir: PathLike) -> None:
    ignored = ignored_value(dataset_dir)
    for label in [str(case["label"]) for case in cases] if ignored is not None else []:
        if ignored in _values(label):
            raise DataError(f"{label} {_ignored_sentence(ignored)}")


def _ignored_sentence(value: int | None) -> str:
    return (
        f"holds the label value {value}, 'ignore': voxels that nobody annotated. They would be trained and scored as "
        "background, so annotate them, or leave the case out"
    )


def _values(label: str) -> set[int]:
    try:
        return set(count_values(read_array(label)))
    except DataError as error:
        raise DataError(f"{label} {error}") from None


def check_images(datalist: Sequence[Mapping[str, object]], dataset_dir: PathLike, images: str | None = None) -> None:
    """Stops before inference when there is no image, or one cannot be opened.

    Args:
        datalist: cases with ``image``.
        dataset_dir: the folder they were read from.
        images: the pattern of file names that they were found by, where it was not the folder.

    Raises:
        DataError: with a sentence for each problem, naming the file, the pattern or the folder.
    """
    cases = [{"image": case["image"]} for case in datalist]
    if images is None:
        require_data(cases, dataset_dir)
    elif not cases:
        raise DataError(f"no file matches images={images!r}; give a pattern such as 'folder/*.nii.gz', in quotes")
    outputs: dict[str, str] = {}
    for image in (str(case["image"]) for case in cases):
        name = stem(os.path.normpath(image)).casefold()
        if outputs.setdefault(name, image) != image:
            raise DataError(
                f"{outputs[name]} and {image} would both be segmented as {stem(image)}, and one would overwrite the other. "
                "Rename one, or segment them into two folders (output_dir)"
            )
    validate_cases(cases)


def validate_cases(datalist: Sequence[Mapping[str, object]], class_ids: Iterable[int] | Mapping[str, int] = ()) -> None:
    """Stops before training when cases cannot be used. Reads headers, and labels only until every class has been seen.

    Args:
        datalist: cases with ``image`` and, where there is one, ``label``.
        class_ids: label values of which each must occur in at least one label; with their names, for the message.

    Raises:
        DataError: with one sentence a problem, naming the file: missing or unreadable files, images that are not 3D,
            labels on another grid than their image, fractions in a label, classes that no label holds.
    """
    problems, labels = [], []
    for case in datalist:
        _, found = _check_headers(case, Path())
        problems += found
        if "label" in case and not found:
            labels.append(str(case["label"]))
    names = {value: name for name, value in class_ids.items()} if isinstance(class_ids, Mapping) else {}
    missing = set(names or class_ids)
    for label in labels:
        if not missing:
            break
        try:
            missing -= count_values(read_array(label)).keys()
        except DataError as error:
            problems.append(f"{label} {error}")
    if missing and not problems:
        ids = ", ".join(f"{value} ({names[value]})" if value in names else str(value) for value in sorted(missing))
        problems.append(
            f"none of the {len(labels)} labels holds the label value {ids}: check the class names and the data"
        )
    if problems:
        more = len(problems) - MOST_LISTED
        raise DataError("\n".join(problems[:MOST_LISTED] + ([f"and {more} more problems"] if more > 0 else [])))


def _check_case(section: str, case: Mapping[str, object], root: Path) -> tuple[CaseReport, list[str]]:
    report = CaseReport(section, _short(case["image"], root))
    opened, problems = _check_headers(case, root)
    if "image" not in opened:
        return report, problems
    shape, affine = grid_of(opened["image"])
    report.shape = shape
    report.spacing = tuple(round(float(length), 4) for length in nib.affines.voxel_sizes(affine))
    report.orientation = "".join(nib.aff2axcodes(affine))
    try:
        report.intensity = intensity_range(array_of(opened["image"]))
    except DataError as error:
        problems.append(f"{_short(case['image'], root)} {error}")
    if "label" in opened:
        try:
            report.label_voxels = count_values(array_of(opened["label"]))
        except DataError as error:
            problems.append(f"{_short(case['label'], root)} {error}")
    elif "label" not in case and section != "test":
        problems.append(f"{report.image} is a {section} case without a label")
    return report, problems


def _check_whole(
    todo: list[tuple[str, Case]],
    reports: list[CaseReport],
    classes: dict[str, int],
    ignored: int | None,
    root: Path,
) -> list[str]:
    """Problems that show only over all cases."""
    problems = []
    for (section, image), count in Counter(
        (section, os.path.realpath(case["image"])) for section, case in todo
    ).items():
        if count > 1:
            problems.append(f"{_short(image, root)} is listed {count} times in {section}")
    sections = {section: [case for part, case in todo if part == section] for section in SECTIONS}
    problems += [
        f"{_short(second, root)} and {_short(first, root)} are {why}: sections must not share a case"
        for why, first, second in find_leaks(sections)
    ]
    holders: dict[int, list[CaseReport]] = {}
    for report in reports:
        for value in report.label_voxels:
            holders.setdefault(value, []).append(report)
    for value in sorted(holders.keys() - {0, *classes.values()}):
        first = holders[value][0].image
        if value == ignored:
            problems.append(f"the label of {first}, and {len(holders[value])} in all, {_ignored_sentence(value)}")
            continue
        problems.append(f"label value {value} has no name; it is in {len(holders[value])} cases, first {first}")
    if holders:
        for name, value in classes.items():
            if value not in holders:
                problems.append(f"class {name} (label value {value}) is in no label")
            elif all(report.section != "training" for report in holders[value]):
                problems.append(f"class {name} (label value {value}) is in no training label")
    return problems


def _check_headers(case: Mapping[str, object], root: Path) -> tuple[dict[str, SpatialImage], list[str]]:
    """Opens the volumes of a case; gives those that could be opened, and what is wrong."""
    opened: dict[str, SpatialImage] = {}
    problems: list[str] = []
    for key in ("image", "label"):
        if key not in case:
            continue
        try:
            opened[key] = open_volume(str(case[key]))
        except DataError as error:
            problems.append(f"{_short(case[key], root)} {error}")
    if len(opened) == 2 and not problems:
        difference = grid_difference(grid_of(opened["image"]), grid_of(opened["label"]))
        if difference:
            problems.append(f"{_short(case['label'], root)} does not lie on its image's grid: {difference}")
    return opened, problems


def _range_rows(cases: list[CaseReport]) -> list[tuple[str, str, str]]:
    volumes = [case for case in cases if len(case.shape) == 3]
    shapes, spacings = np.array([case.shape for case in volumes]), np.array([case.spacing for case in volumes])
    rows = []
    for name, table in (("shape, voxels", shapes), ("spacing, mm", spacings)):
        low, high = (" x ".join(f"{value:g}" for value in edge) for edge in (table.min(0), table.max(0)))
        rows.append((name, low, high))
    intensities = [value for case in cases if case.intensity for value in case.intensity]
    if intensities:
        rows.append(("intensity", f"{min(intensities):g}", f"{max(intensities):g}"))
    orientations = Counter(case.orientation for case in cases)
    return [*rows, ("orientation", ", ".join(f"{name}: {count}" for name, count in orientations.most_common()), "")]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]


def _short(path: object, root: Path) -> str:
    text = str(path)
    return os.path.relpath(text, root) if root != Path() and Path(text).is_relative_to(root) else text
