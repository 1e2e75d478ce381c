from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from monai_petl.data import DataError, check_dataset, class_names, load_datalist, validate_cases

HIPPOCAMPUS = Path(__file__).parents[2] / "../shared/data/mr_hippocampus"
SHAPE = (6, 5, 4)


def write(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine), path)


def image_voxels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-100, 200, SHAPE).astype(np.int16)


def label_voxels() -> np.ndarray:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[1:3, 1:3] = 1
    label[4, 4] = 2
    return label


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three training cases, one for validation, one for test, without fault."""
    sections: dict[str, list[dict[str, str]]] = {"training": [], "validation": [], "test": []}
    for index, section in enumerate(["training"] * 3 + ["validation", "test"]):
        entry = {kind: f"{kind}s/{index}.nii.gz" for kind in ("image", "label")}
        write(tmp_path / entry["image"], image_voxels(index))
        write(tmp_path / entry["label"], label_voxels())
        sections[section].append(entry)
    labels = {"0": "background", "1": "liver", "2": "spleen"}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, **sections}), encoding="utf-8")
    return tmp_path


def nan_image(root: Path) -> None:
    voxels = image_voxels().astype(np.float32)
    voxels[0, 0, :2] = np.nan
    write(root / "images/1.nii.gz", voxels)


def constant_image(root: Path) -> None:
    write(root / "images/1.nii.gz", np.full(SHAPE, 7, dtype=np.int16))


def truncated_image(root: Path) -> None:
    path = root / "images/1.nii.gz"
    write(path, np.random.default_rng(0).normal(size=(40, 40, 20)).astype(np.float32))
    path.write_bytes(path.read_bytes()[:2000])
    write(root / "labels/1.nii.gz", np.ones((40, 40, 20), dtype=np.uint8))


def not_an_image(root: Path) -> None:
    (root / "images/1.nii.gz").write_text("not an image", encoding="utf-8")


def missing_label(root: Path) -> None:
    (root / "labels/1.nii.gz").unlink()


def label_of_other_shape(root: Path) -> None:
    write(root / "labels/1.nii.gz", label_voxels()[:5])


def label_elsewhere(root: Path) -> None:
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[0, 3] = 1.5
    write(root / "labels/1.nii.gz", label_voxels(), affine)


def label_mirrored(root: Path) -> None:
    write(root / "labels/1.nii.gz", label_voxels(), np.diag([-2.0, 2.0, 3.0, 1.0]))


def label_with_fractions(root: Path) -> None:
    write(root / "labels/1.nii.gz", label_voxels() * np.float32(0.5))


def negative_label(root: Path) -> None:
    write(root / "labels/1.nii.gz", -label_voxels().astype(np.int16))


def image_with_four_axes(root: Path) -> None:
    write(root / "images/1.nii.gz", np.stack([image_voxels()] * 2, -1))


BROKEN = [  # what is done, what the report says, whether the headers show it
    (nan_image, "images/1.nii.gz holds 2 voxels that are NaN or infinite", False),
    (constant_image, "images/1.nii.gz is constant: every voxel is 7", False),
    (truncated_image, "images/1.nii.gz cannot be read", False),
    (not_an_image, "images/1.nii.gz cannot be read", True),
    (missing_label, "labels/1.nii.gz is missing", True),
    (label_of_other_shape, r"labels/1.nii.gz does not lie on its image's grid: shape \(5, 5, 4\)", True),
    (label_elsewhere, "labels/1.nii.gz does not lie on its image's grid: corners lie up to 1.5 mm apart", True),
    (label_mirrored, "labels/1.nii.gz does not lie on its image's grid: corners", True),
    (label_with_fractions, "labels/1.nii.gz holds .* not whole numbers", False),
    (negative_label, "labels/1.nii.gz holds label values from -2 to 0", False),
    (image_with_four_axes, "images/1.nii.gz has 4 axes", True),
]


def test_a_sound_data_set_has_no_problems(dataset):
    report = check_dataset(dataset)
    assert report.ok
    assert report.problems == []
    assert [case.section for case in report.cases] == ["training"] * 3 + ["validation", "test"]
    first = report.cases[0]
    assert first.shape == SHAPE
    assert first.spacing == (2.0, 2.0, 3.0)
    assert first.orientation == "RAS"
    assert first.label_voxels == {0: 100, 1: 16, 2: 4}
    assert first.intensity == (image_voxels().min(), image_voxels().max())
    validate_cases(load_datalist(dataset), class_names(dataset).values())


def test_the_report_is_a_table_and_a_dictionary(dataset):
    report = check_dataset(dataset)
    text = str(report)
    assert "3 training, 1 validation, 1 test" in text
    assert any(line.split() == ["liver", "1", "5", "13.333", "%"] for line in text.splitlines())
    assert "2 x 2 x 3" in text
    assert "no problems found" in text
    contents = json.loads(json.dumps(report.to_dict()))
    assert contents["ok"] is True
    assert len(contents["cases"]) == 5


@pytest.mark.parametrize(("spoil", "sentence", "in_headers"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_each_fault_is_named_with_its_file(dataset, spoil, sentence, in_headers):
    spoil(dataset)
    report = check_dataset(dataset)
    assert not report.ok
    assert len(report.problems) == 1, report.problems
    assert re.search(sentence, report.problems[0])
    assert report.problems[0] in str(report)
    if in_headers:
        with pytest.raises(DataError, match=sentence):
            validate_cases(load_datalist(dataset), class_names(dataset).values())


def test_values_without_name_and_names_without_value_are_found(dataset):
    for index in range(5):
        label = label_voxels()
        label[label == 2] = 9
        write(dataset / f"labels/{index}.nii.gz", label)
    assert check_dataset(dataset).problems == [
        "label value 9 has no name; it is in 5 cases, first images/0.nii.gz",
        "class spleen (label value 2) is in no label",
    ]
    with pytest.raises(DataError, match="none of the 3 labels holds the label value 2"):
        validate_cases(load_datalist(dataset), [1, 2])
    validate_cases(load_datalist(dataset), [1, 9])


def test_a_class_outside_training_is_found(dataset):
    for index in range(3):
        write(dataset / f"labels/{index}.nii.gz", np.minimum(label_voxels(), 1))
    assert check_dataset(dataset).problems == ["class spleen (label value 2) is in no training label"]


def test_a_case_in_two_sections_or_without_label_is_found(dataset):
    contents = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    contents["test"].append(contents["training"][0])
    contents["training"].append("images/3.nii.gz")
    (dataset / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
    problems = check_dataset(dataset).problems
    assert "images/3.nii.gz is a training case without a label" in problems
    assert any("images/0.nii.gz and images/0.nii.gz are the same file" in problem for problem in problems)


def test_files_without_partner_in_plain_folders_are_found(dataset):
    (dataset / "dataset.json").unlink()
    (dataset / "labels.json").write_text('{"1": "liver", "2": "spleen"}', encoding="utf-8")
    (dataset / "labels/4.nii.gz").unlink()
    assert check_dataset(dataset).problems == ["images/4.nii.gz has no partner of that name"]


def test_an_empty_or_unreadable_folder_is_reported(tmp_path):
    assert "holds no cases" in check_dataset(tmp_path).problems[0]
    (tmp_path / "dataset.json").write_text("{", encoding="utf-8")
    assert "cannot be read as JSON" in check_dataset(tmp_path).problems[0]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_dataset(tmp_path / "nowhere")


def test_nrrd_and_metaimage_lie_on_the_grid_of_the_same_nifti(tmp_path):
    image = sitk.GetImageFromArray(image_voxels())
    image.SetSpacing((1.5, 2.0, 3.0))
    image.SetOrigin((-10.0, 20.0, 5.0))
    image.SetDirection((0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    paths = [str(tmp_path / f"a{ending}") for ending in (".nrrd", ".mha", ".nii.gz")]
    for path in paths:
        sitk.WriteImage(image, path)
    for label in paths[:2]:
        validate_cases([{"image": paths[2], "label": label}])
    with pytest.raises(DataError, match="label value 300"):
        validate_cases([{"image": paths[2]}], [300])


def test_many_problems_are_cut_short(tmp_path):
    cases = [{"image": str(tmp_path / f"{i}.nii.gz")} for i in range(50)]
    with pytest.raises(DataError, match="and 30 more problems"):
        validate_cases(cases)


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus volumes are not at hand")
def test_real_volumes_pass():
    cases = load_datalist(HIPPOCAMPUS)[:10]
    validate_cases(cases, class_names(HIPPOCAMPUS).values())  # does not raise
    with pytest.raises(DataError, match="label value"):
        validate_cases(cases, [3])
