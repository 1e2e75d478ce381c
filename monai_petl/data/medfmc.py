"""The lists of MedFMC (ChestDR, ColonPath, Endo) as a table of images.

D. Wang et al., "A real-world dataset and benchmark for foundation model adaptation in medical image classification", Scientific
Data 10, 574 (2023). What a shot is there: W. Zu et al., arXiv:2407.01003.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from monai_petl.data.datalist import SECTIONS, DataError, PathLike
from monai_petl.data.few_shot import ImageCase, positive_classes
from monai_petl.files.atomic import write_text

__all__ = ["MEDFMC_CLASSES", "make_medfmc_table", "read_medfmc_list"]


@dataclass(frozen=True)
class Task:
    """One of the three tasks.

    Attributes:
        classes: their names, in order.
        several: whether an image may have several classes, or none.
        group: file name -> what its images belong to: the image itself, a slide, a study.
    """

    classes: tuple[str, ...]
    several: bool
    group: Callable[[str], str]


TASKS = {
    "chest": Task(
        (
            "pleural effusion", "nodule", "pneumonia", "cardiomegaly", "hilar enlargement", "old fracture", "fibrosis",
            "aortic calcification", "tortuous aorta", "thickened pleura", "TB", "pneumothorax", "emphysema", "atelectasis",
            "calcification", "pulmonary edema", "increased lung markings", "elevated diaphragm", "consolidation",
        ),
        True,
        str,
    ),
    "colon": Task(("negative", "positive"), False, lambda name: name[:-9]),
    "endo": Task(("ulcer", "erosion", "polyp", "tumor"), True, lambda name: name[:18]),
}  # fmt: skip
MEDFMC_CLASSES = {name: task.classes for name, task in TASKS.items()}


def read_medfmc_list(path: PathLike, task: str, images: PathLike = ".") -> list[ImageCase]:
    """The images of a list file, in the form of :func:`monai_petl.data.load_image_list`.

    Args:
        path: lines of a file name and its labels: ``name 0,1,..`` (chest), ``name 0 1 0 0`` (endo), ``name 1`` (colon, whose
            names contain blanks).
        task: ``"chest"``, ``"colon"`` or ``"endo"``.
        images: the folder of the images.

    Raises:
        ValueError: there is no such task.
        DataError: the file cannot be read; a line has another number of labels, or others than 0 and 1.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return [
        _case(line, TASKS[task], Path(images), f"line {n} of {path}") for n, line in enumerate(lines, 1) if line.strip()
    ]


def _case(line: str, task: Task, images: Path, where: str) -> ImageCase:
    count = len(task.classes) if task.several else 1
    if "," in line and task.several:
        name, _, text = line.strip().rpartition(" ")
        labels = text.split(",")
    else:
        name, *labels = line.strip().rsplit(" ", count)
    if not name or len(labels) != count or not set(labels) <= {"0", "1"}:
        wanted = f"{count} labels of 0 and 1" if task.several else "a label of 0 or 1"
        raise DataError(f"{where} should be a file name and {wanted}: {line!r}")
    label = np.array(labels, dtype=np.float32) if task.several else int(labels[0])
    case: ImageCase = {"image": str(images / name), "label": label, "group": task.group(name)}
    return {**case, "class_name": "|".join(task.classes[place] for place in positive_classes(case))}


def make_medfmc_table(task: str, images: PathLike, lists: Mapping[str, PathLike], out: PathLike | None = None) -> Path:
    """Write ``labels.csv`` for bundles from list files; the images stay where they are.

    Args:
        task: ``"chest"``, ``"colon"`` or ``"endo"``.
        images: the folder of the images.
        lists: ``training``, ``validation`` or ``test`` -> a list file.
        out: the folder to write the table to, which becomes a bundle's ``dataset_dir``; default that of the images.

    Returns:
        The table's path.

    Raises:
        ValueError: there is no such task or section.
        DataError: a list cannot be read, or an image is missing.
    """
    strange = [section for section in lists if section not in SECTIONS]
    if strange or not lists:
        raise ValueError(
            f"give a list for {', '.join(SECTIONS)}, at least for one of them; got {', '.join(lists) or 'none'}"
        )
    folder, target = Path(images).resolve(), Path(out or images).resolve()
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "class_name", "group", "split"])
    for section, path in lists.items():
        for case in read_medfmc_list(path, task, folder):
            if not Path(case["image"]).is_file():
                raise DataError(f"{path} lists {case['image']}, which is not there; give the folder of the images")
            table.writerow([os.path.relpath(case["image"], target), case["class_name"], case["group"], section])
    write_text(target / "labels.csv", text.getvalue(), "the table")
    return target / "labels.csv"
