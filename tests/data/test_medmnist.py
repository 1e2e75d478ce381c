"""Files of MedMNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from monai_petl.data import DataError, load_image_list, make_medmnist_folder, require_images
from tests.conftest import Run


def save(path: Path, shape: tuple[int, ...], labels: np.ndarray, **changes) -> Path:
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 6), ("val", 2), ("test", 3)):
        arrays[f"{part}_images"] = random.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = labels[:count]
    np.savez(path, **{**arrays, **changes})
    return path


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3)])
def test_images_and_classes_come_back(tmp_path: Path, shape: tuple[int, ...], run: Run) -> None:
    labels = np.array([[0], [1], [0], [1], [2], [2]])
    source = save(tmp_path / "mnist.npz", shape, labels)
    assert str(tmp_path / "set") in run("data", "medmnist", source, tmp_path / "set", "--class_names", "a,b,c")
    cases = load_image_list(tmp_path / "set", "training", ["a", "b", "c"])
    assert [case["label"] for case in cases] == labels[:, 0].tolist()
    require_images(cases, tmp_path / "set", ["a", "b", "c"], load_image_list(tmp_path / "set", "validation"))
    with np.load(source) as file, Image.open(cases[3]["image"]) as picture:
        assert np.array_equal(np.asarray(picture), file["train_images"][3])
    assert [len(load_image_list(tmp_path / "set", part)) for part in ("training", "validation", "test")] == [6, 2, 3]


def test_several_labels_and_volumes(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0]])
    folder = make_medmnist_folder(save(tmp_path / "chest.npz", (28, 28), labels), tmp_path / "chest")
    cases = load_image_list(folder, "training", ["0", "1", "2"], multi_label=True)
    assert np.array_equal(np.stack([case["label"] for case in cases]), labels)
    volumes = save(tmp_path / "organ.npz", (8, 9, 10), labels[:, :1])
    folder = make_medmnist_folder(volumes, tmp_path / "organ", ["x", "y"])
    case = load_image_list(folder, "test", ["x", "y"])[2]
    with np.load(volumes) as file:
        assert np.array_equal(np.load(case["image"]), file["test_images"][2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_images": np.zeros((2, 28, 28))}, r"val has images \(2, 28, 28\) of float64"),
        ({"test_labels": np.zeros((7, 1), int)}, r"labels \(7, 1\)"),
    ],
)
def test_another_form_is_named_and_nothing_is_written(tmp_path: Path, changes, message: str) -> None:
    source = save(tmp_path / "a.npz", (28, 28), np.zeros((6, 1), int), **changes)
    with pytest.raises(DataError, match=message):
        make_medmnist_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="cannot be read as a file of MedMNIST"):
        make_medmnist_folder(tmp_path / "text.npz", tmp_path / "out")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="it has no train_images"):
        make_medmnist_folder(tmp_path / "other.npz", tmp_path / "out")
    source = save(tmp_path / "a.npz", (28, 28), np.zeros((6, 1), int))
    with pytest.raises(DataError, match="has 1 classes, and 2 names were given: a, b"):
        make_medmnist_folder(source, tmp_path / "out", ["a", "b"])
