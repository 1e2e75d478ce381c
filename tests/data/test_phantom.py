from __future__ import annotations

import time

import nibabel as nib
import numpy as np
import pytest

from monai_petl.data import PHANTOM_CLASSES, check_dataset, class_names, load_datalist, make_phantom
from monai_petl.data import make_phantom_dataset as make


def test_a_seed_gives_one_phantom_and_another_seed_another():
    image, label, classes = make_phantom(3, size=(48, 48, 8))
    again, label_again, _ = make_phantom(3, size=(48, 48, 8))
    other, _, _ = make_phantom(4, size=(48, 48, 8))
    assert image.dtype == np.int16
    assert label.dtype == np.uint8
    assert image.shape == label.shape == (48, 48, 8)
    assert np.array_equal(image, again)
    assert np.array_equal(label, label_again)
    assert not np.array_equal(image, other)
    assert classes == PHANTOM_CLASSES


@pytest.mark.parametrize("seed", range(6))
def test_every_organ_is_in_most_slices_and_in_its_place(seed):
    _, label, classes = make_phantom(seed)
    centre = {}
    for name, value in classes.items():
        in_slices = (label == value).any(axis=(0, 1))
        assert in_slices.mean() > 0.6, name
        centre[name] = np.argwhere(label == value).mean(axis=0)
    assert centre["liver"][0] > centre["spleen"][0] + 20  # RAS: the first axis runs to the patient's right
    assert centre["spine"][1] < centre["aorta"][1]  # the second to the front
    right_kidney = label[48:] == classes["kidney"]
    assert 0.15 < right_kidney.sum() / (label == classes["kidney"]).sum() < 0.85  # one on each side


def test_a_threshold_does_not_find_the_kidney():
    """Over four subjects the best window of HU, chosen with the labels in hand, stays below a Dice score of 0.5."""
    pairs = [make_phantom(seed)[:2] for seed in range(4)]
    image = np.stack([pair[0] for pair in pairs])
    kidney = np.stack([pair[1] for pair in pairs]) == PHANTOM_CLASSES["kidney"]
    edges = np.arange(0, 260, 10)
    inside = np.histogram(image[kidney], edges)[0].cumsum()
    all_of_it = np.histogram(image, edges)[0].cumsum()
    true = inside[None] - inside[:, None]
    chosen = all_of_it[None] - all_of_it[:, None]
    dice = np.triu(2 * true / (chosen + kidney.sum()))
    assert dice.max() < 0.5


def test_intensities_are_those_of_a_ct():
    image, label, classes = make_phantom(0)
    mean = {name: image[label == value].mean() for name, value in classes.items()}
    assert image[0, -1].mean() < -950  # air in the corner
    assert 60 < mean["liver"] < 150
    assert mean["spine"] > mean["liver"] + 60
    assert 5 < image[0, :].astype(float)[image[0, :] > -1024].std() < 40  # noise


def test_a_phantom_takes_a_fraction_of_a_second():
    make_phantom(0)
    start = time.process_time()
    for seed in range(3):
        make_phantom(seed)
    assert (time.process_time() - start) / 3 < 1.0  # about 0.2 s on a free core


@pytest.mark.parametrize("size", [(8, 96, 24), (96, 96, 0), (96, 96)])
def test_a_size_without_room_for_organs_is_refused(size):
    with pytest.raises(ValueError, match="at least 16 x 16 x 1"):
        make_phantom(0, size=size)


def test_a_spacing_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="spacing"):
        make_phantom(0, spacing=(1.0, 1.0, 0.0))


def test_the_written_data_set_is_whole_and_can_be_scored(tmp_path):
    folder = make(tmp_path / "set", 3, 1, 2, seed=5, size=(48, 48, 8), spacing=(5.0, 5.0, 10.0))
    report = check_dataset(folder)
    assert report.ok, report
    assert class_names(folder) == PHANTOM_CLASSES
    counts = {section: len(load_datalist(folder, section)) for section in ("training", "validation", "test")}
    assert counts == {"training": 3, "validation": 1, "test": 2}
    test_case = load_datalist(folder, "test")[0]
    image = nib.load(test_case["image"])
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == (5.0, 5.0, 10.0)
    assert np.allclose(image.affine @ [23.5, 23.5, 3.5, 1], [0, 0, 0, 1])
    assert np.array_equal(nib.load(test_case["label"]).dataobj, make_phantom((5, 4), (48, 48, 8), (5.0, 5.0, 10.0))[1])


def test_an_occupied_folder_is_left_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        make(tmp_path, 1, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("counts", [(0, 0, 0), (-1, 1, 1)])
def test_senseless_counts_are_refused(tmp_path, counts):
    with pytest.raises(ValueError, match="numbers of volumes"):
        make(tmp_path / "set", *counts)
