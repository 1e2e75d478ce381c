"""Label maps: values near whole numbers, values without a class, and voxels that nobody annotated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from monai_petl.data import check_training_data, load_datalist
from tests.inputs import Input
from tests.pipelines import read_case
from tests.volumes import dataset, save, volume

KIND = "Labels"


def second_label(change: Callable[[np.ndarray], np.ndarray], **table: int) -> Callable[[Path], None]:
    """The second training label is changed: not the first, which the check before training reads anyway."""

    def check(folder: Path) -> None:
        names = {"background": 0, "liver": 1, "spleen": 2, **table}
        root = dataset(folder, labels=names)
        case = load_datalist(root)[1]
        label = volume(1)[1]
        save(Path(case["label"]), change(label))
        check_training_data(load_datalist(root), root, ["liver", "spleen"], load_datalist(root, "validation"))
        seen = read_case(case, root, (2, 2, 3))["label"].numpy()[0]
        assert np.array_equal(seen, np.where(label <= 2, label, 0))

    return check


def no_class_in_validation(folder: Path) -> None:
    root = dataset(folder)
    save(Path(load_datalist(root, "validation")[0]["label"]), np.zeros_like(volume()[1]))
    check_training_data(load_datalist(root), root, ["liver", "spleen"], load_datalist(root, "validation"))


def other_classes_merge(folder: Path) -> None:
    root = dataset(folder)
    case = load_datalist(root)[0]
    seen = read_case(case, root, (2, 2, 3), class_names=["spleen"])["label"].numpy()[0]
    assert np.array_equal(seen, volume()[1] == 2)


def regions(folder: Path) -> None:
    root = dataset(folder)
    contents = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    contents["labels"] = {"background": 0, "whole tumour": [1, 2], "core": [2]}
    (root / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
    check_training_data(load_datalist(root), root, ["core"])


def below(label: np.ndarray) -> np.ndarray:
    return label * (1 - 1e-7)


def blurred(label: np.ndarray) -> np.ndarray:
    return np.where(label == 2, 1.5, label).astype(np.float32)


def with_nan(label: np.ndarray) -> np.ndarray:
    return np.where(label == 2, np.nan, label).astype(np.float32)


def value(new: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(label: np.ndarray) -> np.ndarray:
        found = label.astype(np.int32)
        found[-1, -1, -1] = new
        return found

    return change


INPUTS = [
    Input(KIND, "64-bit floats just below whole numbers, such as 1.9999998", second_label(below)),
    Input(KIND, "32-bit floats 0.0009 above whole numbers", second_label(lambda v: (v + 9e-4 * (v > 0)).astype(np.float32))),
    Input(KIND, "16-bit unsigned integers", second_label(lambda v: v.astype(np.uint16))),
    Input(KIND, "64-bit integers", second_label(lambda v: v.astype(np.int64))),
    Input(KIND, "values 0.002 above whole numbers", second_label(lambda v: v + 2e-3 * (v > 0)),
          True, ("c1.nii.gz holds", "1.002", "nearest neighbours")),
    Input(KIND, "fractions, as after linear resampling", second_label(blurred), True, ("c1.nii.gz holds", "such as 1.5")),
    Input(KIND, "NaN", second_label(with_nan), True, ("c1.nii.gz holds", "such as nan")),
    Input(KIND, "a negative value", second_label(value(-1)), True, ("c1.nii.gz holds the label value -1",)),
    Input(KIND, "a value that no class has", second_label(value(77)), True,
          ("c1.nii.gz holds the label value 77", "1 liver, 2 spleen", "dataset.json")),
    Input(KIND, "classes of the data set that are not trained", other_classes_merge),
    Input(KIND, "`ignore` in the table, held by no label", second_label(lambda v: v, ignore=3)),
    Input(KIND, "`ignore` in the table, held by a label", second_label(value(3), ignore=3), True,
          ("c1.nii.gz holds the label value 3, 'ignore'", "annotate them")),
    Input(KIND, "classes of several values, nnU-Net's regions", regions, True, ("names regions", "one value")),
    Input(KIND, "no class in any label for validation", no_class_in_validation, True,
          ("none of the 1 labels for validation", "liver, spleen")),
]  # fmt: skip
