"""Builds a data set in Decathlon layout from NIfTI, MGH, NRRD, MetaImage or DICOM files.

Volumes are read as in training and written as NIfTI. Nothing is resampled: a label that does not lie on its image's grid is an
error.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from monai_petl.data.datalist import (
    SECTIONS,
    DataError,
    PathLike,
    match_name,
    new_dataset_folder,
    split_cases,
    write_dataset_json,
)
from monai_petl.data.dicom import modality_of, series_ids
from monai_petl.data.folders import ending_of, stem
from monai_petl.data.volume_files import open_volume
from monai_petl.data.volume_writer import write_volume
from monai_petl.data.volumes import array_of, count_values, grid_difference, grid_of, intensity_range, whole_numbers

__all__ = ["make_dataset"]

Volume = tuple[NDArray[np.generic], NDArray[np.float64]]  # voxels (H, W, D) and affine (voxel -> mm, RAS)
ClassNames = str | Sequence[str] | Mapping[str, int | Sequence[int]]


def make_dataset(
    images: PathLike,
    labels: PathLike,
    out: PathLike,
    class_names: ClassNames | None = None,
    *,
    case_pattern: str | None = None,
    subject_pattern: str | None = None,
    source_pattern: str | None = None,
    seed: int = 1,
    modality: str | None = None,
) -> Path:
    """Pairs images with labels by name, checks them, and writes them as a data set split 70/10/20.

    The output folder appears when all of it has been written; when anything is wrong, nothing is left behind.

    Args:
        images: folder, searched with its sub-folders, or a glob pattern such as ``"ct/volume-*.nii.gz"``. A DICOM
            series is a folder of its own and takes the name of the folder below ``images``.
        labels: the same for the labels.
        out: folder to make; it must be absent or empty.
        class_names: names of label values 1, 2, ... as a list or a text with commas (another value is an error); or a
            mapping of each name to its label value or values, renumbered 1, 2, ... (others become background).
            Default: the values stay and are named ``class_1``, ...
        case_pattern: regular expression searched in the path below ``images`` or ``labels``; what its first group finds
            is the case's name. Default: the file's name without ending.
        subject_pattern: the same, searched in case names; the cases of a subject stay in one section.
        source_pattern: the same; each source is split by itself.
        seed: seed of the split.
        modality: what ``dataset.json`` says of the images, such as ``CT`` or ``MR``. Default: what the DICOM series say, if
            all say the same, else ``unknown``.

    Returns:
        the folder.

    Raises:
        DataError: naming the file, when files are missing, unreadable, not 3D, without a partner, on different grids,
            or a label holds values that have no name or lacks those that have one.
        FileExistsError: when ``out`` holds files.
        OSError: when ``out`` cannot be written.

    Example::

        make_dataset("scans", "masks", "my_data", class_names=["liver", "spleen"])
    """
    names, numbers, strict = _read_class_names(class_names)
    pairs = _pair(_find(images, case_pattern), _find(labels, case_pattern), f"{images}", f"{labels}")
    groups: dict[str, list[str]] = {}
    for case in pairs:
        groups.setdefault(match_name(case, source_pattern) if source_pattern else "", []).append(case)
    split = split_cases(groups, seed, lambda case: match_name(case, subject_pattern))
    todo = [(section, case) for section in SECTIONS for case in split[section]]
    sections: dict[str, list[dict[str, str]]] = {section: [] for section in SECTIONS}
    present: set[int] = set()
    with new_dataset_folder(out) as folder:
        for section, case in tqdm(todo, desc="converting", unit="case", disable=None):
            image, label, affine = _read_pair(*pairs[case])
            label = _renumber(label, numbers, strict, pairs[case][1])
            present |= count_values(label).keys()
            part = "Ts" if section == "test" else "Tr"
            entry = {kind: f"{kind}s{part}/{case}.nii.gz" for kind in ("image", "label")}
            for kind, voxels in (("image", image), ("label", label)):
                (folder / entry[kind]).parent.mkdir(exist_ok=True)
                write_volume(folder / entry[kind], voxels, affine)
            sections[section].append(entry)
        if class_names is None:
            names = {f"class_{value}": value for value in sorted(present - {0})}
        absent = [name for name, value in names.items() if value not in present]
        if absent:
            raise DataError(f"no label in {labels} holds the class {', '.join(absent)}: check class_names")
        said = modality or _modality(image for image, _ in pairs.values())
        write_dataset_json(folder, sections, names, name=Path(out).name, modality=said)
    return Path(out)


def _read_class_names(class_names: ClassNames | None) -> tuple[dict[str, int], dict[int, int], bool]:
    """Gives name -> written value, read value -> written value, and whether other read values are an error."""
    if class_names is None:
        return {}, {}, False
    if isinstance(class_names, str):
        class_names = [name.strip() for name in class_names.split(",")]
    strict = not isinstance(class_names, Mapping)
    table = class_names if isinstance(class_names, Mapping) else {n: i for i, n in enumerate(class_names, start=1)}
    if not table or len(table) != len(class_names) or not all(table):
        raise ValueError(f"class_names must be different names, got {class_names}")
    numbers: dict[int, int] = {}
    for new, (name, values) in enumerate(table.items(), start=1):
        for value in [values] if isinstance(values, int) else values:
            if value < 1 or value in numbers:
                raise ValueError(f"class {name}: label value {value} must be positive and belong to one class only")
            numbers[value] = new
    return {name: new for new, name in enumerate(table, start=1)}, numbers, strict


def _find(place: PathLike, case_pattern: str | None) -> dict[str, Path]:
    """Finds the volumes of a folder or glob pattern: case name -> file or DICOM series."""
    found: list[tuple[str, str, Path]] = []  # default name, path below the folder, source
    if os.path.isdir(place):
        found = _walk(Path(place))
    else:
        for match in map(Path, sorted(glob.glob(os.fspath(place), recursive=True))):
            found += _walk(match) if match.is_dir() else [(stem(match), match.name, match)]
    if not found:
        raise DataError(f"{place} holds no volumes: NIfTI, NRRD, MetaImage or DICOM files were looked for")
    cases: dict[str, Path] = {}
    for name, below, source in found:
        if case_pattern:
            if not re.search(case_pattern, below):
                raise DataError(f"case_pattern {case_pattern!r} finds nothing in {below} (in {place})")
            name = match_name(below, case_pattern)
        name = re.sub(r"[^\w.-]+", "_", name)
        if name in cases:
            raise DataError(f"{place} holds two volumes for case {name}: {_show(cases[name])} and {_show(source)}")
        cases[name] = source
    return cases


def _walk(folder: Path) -> list[tuple[str, str, Path]]:
    found: list[tuple[str, str, Path]] = []
    series: list[Path] = []
    for current, folders, files in os.walk(folder):
        folders.sort()
        visible = sorted(name for name in files if not name.startswith("."))
        volumes = [Path(current, name) for name in visible if ending_of(name)]
        found += [(re.sub(r"_0000$", "", stem(path)), str(path.relative_to(folder)), path) for path in volumes]
        if visible and not volumes and series_ids(current):
            series.append(Path(current))
    tops = [path.relative_to(folder).parts[:1] for path in series]
    for path, top in zip(series, tops, strict=True):
        below = path.relative_to(folder)
        name = "_".join(top if tops.count(top) == 1 else below.parts) or folder.name
        found.append((name, str(below) if below.parts else folder.name, path))
    return found


def _modality(images: Iterable[Path]) -> str:
    """What the DICOM series among the images say, if it is one thing."""
    said = {modality_of(path) if path.is_dir() else "" for path in images}
    return said.pop() if len(said) == 1 and all(said) else "unknown"


def _pair(
    images: dict[str, Path], labels: dict[str, Path], images_at: str, labels_at: str
) -> dict[str, tuple[Path, Path]]:
    hint = "Give both files of a case the same name, or a case_pattern that finds the same text in both."
    for here, there, at, other in ((images, labels, images_at, labels_at), (labels, images, labels_at, images_at)):
        alone = sorted(here.keys() - there.keys())
        if alone:
            more = f" and {len(alone) - 5} more" if len(alone) > 5 else ""
            raise DataError(f"{at} holds cases without a partner in {other}: {', '.join(alone[:5])}{more}. {hint}")
    return {case: (images[case], labels[case]) for case in sorted(images)}


def _read_pair(image_at: Path, label_at: Path) -> tuple[NDArray[np.generic], NDArray[np.generic], NDArray[np.float64]]:
    """Reads a case; the image as int16 where that loses nothing, else float32."""
    (image, affine), (label, other) = _read(image_at), _read(label_at)
    difference = grid_difference((image.shape, affine), (label.shape, other))
    if difference:
        raise DataError(
            f"{_show(label_at)} does not lie on the grid of {_show(image_at)}: {difference}. "
            "Resample the label onto the image first, with nearest neighbours."
        )
    try:
        low, high = intensity_range(image)
    except DataError as error:
        raise DataError(f"{_show(image_at)} {error}") from None
    whole = not np.issubdtype(image.dtype, np.inexact) or bool(np.all(image == np.rint(image)))
    fits = whole and low >= -32768 and high <= 32767
    return image.astype(np.int16 if fits else np.float32, copy=False), label, affine


def _read(path: Path) -> Volume:
    try:
        opened = open_volume(path)
        return array_of(opened), grid_of(opened)[1]
    except DataError as error:
        raise DataError(f"{_show(path)} {error}") from None


def _renumber(
    label: NDArray[np.generic], numbers: dict[int, int], strict: bool, path: Path
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Gives a label its written values, as uint8 where they fit."""
    try:
        label = whole_numbers(label)
        values = count_values(label).keys()
    except DataError as error:
        raise DataError(f"{_show(path)} {error}") from None
    if strict and values - numbers.keys() - {0}:
        extra = ", ".join(map(str, sorted(values - numbers.keys() - {0})))
        raise DataError(f"{_show(path)} holds label value {extra}, for which class_names has no name")
    table = {value: numbers.get(value, 0) for value in values} if numbers else {value: value for value in values}
    written = np.zeros(label.shape, dtype=np.uint8 if max(table.values()) < 256 else np.uint16)
    for value, new in table.items():
        if new:
            written[label == value] = new
    return written


def _show(path: Path) -> str:
    return f"DICOM series {path}" if path.is_dir() else str(path)
