"""Builds a data set in Decathlon layout from NIfTI, NRRD, MetaImage or DICOM files.

Volumes are read and written with SimpleITK, which turns DICOM's axes (left, back, head) into NIfTI's (right, front,
head). Nothing is resampled: a label that does not lie on its image's grid is an error.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray
from tqdm import tqdm

from monai_petl.data.datalist import (
    SECTIONS,
    VOLUME_SUFFIXES,
    DataError,
    PathLike,
    match_name,
    new_dataset_folder,
    split_cases,
    stem,
    write_dataset_json,
)
from monai_petl.data.volumes import count_values, grid_difference, intensity_range, last_line, read_array, sitk_grid

__all__ = ["make_dataset"]

Source = Path | tuple[str, ...]  # a file, or the slices of a DICOM series in order
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
    modality: str = "CT",
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
        modality: what ``dataset.json`` says of the images.

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
            image, label = _read_pair(*pairs[case])
            label = _renumber(label, numbers, strict, pairs[case][1])
            present |= count_values(sitk.GetArrayViewFromImage(label)).keys()
            part = "Ts" if section == "test" else "Tr"
            entry = {kind: f"{kind}s{part}/{case}.nii.gz" for kind in ("image", "label")}
            _write(image, folder / entry["image"])
            _write(label, folder / entry["label"])
            sections[section].append(entry)
        if class_names is None:
            names = {f"class_{value}": value for value in sorted(present - {0})}
        absent = [name for name, value in names.items() if value not in present]
        if absent:
            raise DataError(f"no label in {labels} holds the class {', '.join(absent)}: check class_names")
        write_dataset_json(folder, sections, names, name=Path(out).name, modality=modality)
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


def _find(place: PathLike, case_pattern: str | None) -> dict[str, Source]:
    """Finds the volumes of a folder or glob pattern: case name -> file or DICOM series."""
    found: list[tuple[str, str, Source]] = []  # default name, path below the folder, source
    if os.path.isdir(place):
        found = _walk(Path(place))
    else:
        for match in map(Path, sorted(glob.glob(os.fspath(place), recursive=True))):
            found += _walk(match) if match.is_dir() else [(stem(match), match.name, match)]
    if not found:
        raise DataError(f"{place} holds no volumes: NIfTI, NRRD, MetaImage or DICOM files were looked for")
    cases: dict[str, Source] = {}
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


def _walk(folder: Path) -> list[tuple[str, str, Source]]:
    found: list[tuple[str, str, Source]] = []
    series: list[tuple[Path, Source]] = []
    for current, folders, files in os.walk(folder):
        folders.sort()
        visible = sorted(name for name in files if not name.startswith("."))
        volumes = [Path(current, name) for name in visible if name.endswith(VOLUME_SUFFIXES)]
        found += [(re.sub(r"_0000$", "", stem(path)), str(path.relative_to(folder)), path) for path in volumes]
        if visible and not volumes:
            series += [(Path(current), files_of) for files_of in _dicom_series(current)]
    tops = [path.relative_to(folder).parts[:1] for path, _ in series]
    for (path, source), top in zip(series, tops, strict=True):
        below = path.relative_to(folder)
        name = "_".join(top if tops.count(top) == 1 else below.parts) or folder.name
        found.append((name, str(below) if below.parts else folder.name, source))
    return found


def _dicom_series(folder: str) -> list[tuple[str, ...]]:
    ids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder)
    if len(ids) > 1:
        raise DataError(f"{folder} holds {len(ids)} DICOM series; give each a folder of its own")
    return [sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, ids[0])] if ids else []


def _pair(
    images: dict[str, Source], labels: dict[str, Source], images_at: str, labels_at: str
) -> dict[str, tuple[Source, Source]]:
    hint = "Give both files of a case the same name, or a case_pattern that finds the same text in both."
    for here, there, at, other in ((images, labels, images_at, labels_at), (labels, images, labels_at, images_at)):
        alone = sorted(here.keys() - there.keys())
        if alone:
            more = f" and {len(alone) - 5} more" if len(alone) > 5 else ""
            raise DataError(f"{at} holds cases without a partner in {other}: {', '.join(alone[:5])}{more}. {hint}")
    return {case: (images[case], labels[case]) for case in sorted(images)}


def _read_pair(image_source: Source, label_source: Source) -> tuple[sitk.Image, sitk.Image]:
    """Reads a case; the image as int16 where that loses nothing, else float32."""
    image, label = _read(image_source), _read(label_source)
    difference = grid_difference(sitk_grid(image), sitk_grid(label))
    if difference:
        raise DataError(
            f"{_show(label_source)} does not lie on the grid of {_show(image_source)}: {difference}. "
            "Resample the label onto the image first, with nearest neighbours."
        )
    label.CopyInformation(image)
    voxels = _voxels(image, image_source)
    try:
        low, high = intensity_range(voxels)
    except DataError as error:
        raise DataError(f"{_show(image_source)} {error}") from error
    whole = not np.issubdtype(voxels.dtype, np.inexact) or bool(np.all(voxels == np.rint(voxels)))
    fits = whole and low >= -32768 and high <= 32767
    return sitk.Cast(image, sitk.sitkInt16 if fits else sitk.sitkFloat32), label


def _read(source: Source) -> sitk.Image:
    try:
        if isinstance(source, Path):
            image = sitk.ReadImage(str(source))
        else:
            _check_slices(source)
            image = sitk.ReadImage(source)
    except RuntimeError as error:
        raise DataError(f"{_show(source)} cannot be read: {last_line(error)}") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise DataError(
            f"{_show(source)} is not a 3D volume of one value a voxel: "
            f"{image.GetDimension()} axes {image.GetSize()}, {image.GetNumberOfComponentsPerPixel()} values a voxel"
        )
    return image


def _check_slices(files: tuple[str, ...]) -> None:
    """Refuses DICOM segmentation objects and series with missing slices."""
    positions = []
    reader = sitk.ImageFileReader()
    for name in files:
        reader.SetFileName(name)
        reader.ReadImageInformation()
        if reader.HasMetaDataKey("0008|0060") and reader.GetMetaData("0008|0060").strip() in ("SEG", "RTSTRUCT"):
            raise DataError(
                f"{name} is a DICOM segmentation object; convert it to NIfTI first, with dcmqi for instance"
            )
        normal = np.array(reader.GetDirection()).reshape(reader.GetDimension(), -1)[:3, 2]
        positions.append(float(normal @ np.array(reader.GetOrigin()[:3])))
    gaps = np.abs(np.diff(positions))
    if gaps.size and gaps.max() - gaps.min() > max(0.05 * gaps.max(), 0.02):
        raise DataError(
            f"{_show(files)} lacks slices or has uneven ones: they lie {gaps.min():.3g} to {gaps.max():.3g} mm apart"
        )


def _voxels(image: sitk.Image, source: Source) -> NDArray[np.generic]:
    """The voxels as the file holds them: ITK reads NaN in a NIfTI file as 0, which would hide it."""
    voxels: NDArray[np.generic] = sitk.GetArrayViewFromImage(image)
    if isinstance(source, Path) and np.issubdtype(voxels.dtype, np.inexact):
        return read_array(str(source)).T
    return voxels


def _renumber(label: sitk.Image, numbers: dict[int, int], strict: bool, source: Source) -> sitk.Image:
    """Gives a label its written values, as uint8 where they fit."""
    voxels = _voxels(label, source)
    try:
        values = count_values(voxels).keys()
    except DataError as error:
        raise DataError(f"{_show(source)} {error}") from error
    if strict and values - numbers.keys() - {0}:
        extra = ", ".join(map(str, sorted(values - numbers.keys() - {0})))
        raise DataError(f"{_show(source)} holds label value {extra}, for which class_names has no name")
    table = {value: numbers.get(value, 0) for value in values} if numbers else {value: value for value in values}
    written = np.zeros(voxels.shape, dtype=np.uint8 if max(table.values()) < 256 else np.uint16)
    for value, new in table.items():
        if new:
            written[voxels == value] = new
    result = sitk.GetImageFromArray(written)
    result.CopyInformation(label)
    return result


def _write(image: sitk.Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    try:
        sitk.WriteImage(image, str(path))
    except RuntimeError as error:
        raise OSError(f"cannot write {path.name}: {last_line(error)}") from error


def _show(source: Source) -> str:
    return str(source) if isinstance(source, Path) else f"DICOM series {os.path.dirname(source[0])}"
