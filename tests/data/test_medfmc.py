"""The list files of MedFMC."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from monai_petl.data import MEDFMC_CLASSES, DataError, few_shot_split, load_image_list, read_medfmc_list
from tests.conftest import Run, error_of

LINES = {
    "chest": ["a.png " + ",".join("1" if n in (0, 10) else "0" for n in range(19)), "b.png " + ",".join(19 * "0")],
    "colon": ["2019-05 7 04.53.43 0001.png 1", "2019-05 7 04.53.43 0002.png 1", "2019-06 1 11.11.11 0001.png 0"],
    "endo": [
        "study-number-00001-x1.png 0 1 0 0",
        "study-number-00001-x2.png 0 0 0 0",
        "study-number-00002-x1.png 1 0 1 0",
    ],
}


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_all_three_forms_are_read(tmp_path: Path) -> None:
    chest, colon, endo = (read_medfmc_list(write(tmp_path / t, lines), t, "images") for t, lines in LINES.items())
    assert chest[0]["class_name"] == "pleural effusion|TB"
    assert chest[0]["label"].sum() == 2
    assert chest[1]["class_name"] == ""
    assert [case["label"] for case in colon] == [1, 1, 0]
    assert colon[0]["image"] == str(Path("images") / "2019-05 7 04.53.43 0001.png")
    assert colon[0]["group"] == colon[1]["group"] != colon[2]["group"]
    assert [case["class_name"] for case in endo] == ["erosion", "", "ulcer|polyp"]
    assert endo[0]["group"] == endo[1]["group"] == "study-number-00001"
    assert [len(names) for names in MEDFMC_CLASSES.values()] == [19, 2, 4]


def test_a_shot_of_endo_is_a_study_with_its_images_of_the_class(tmp_path: Path) -> None:
    lines = [
        f"study-number-{s:05d}-x{n}.png {int(s % 2 == 0)} {int(s % 3 == 0)} 1 0" for s in range(12) for n in range(3)
    ]
    drawn, rest = few_shot_split(
        read_medfmc_list(write(tmp_path / "l", lines), "endo"), 1, unit="group", published=True
    )
    assert len(drawn) == 3 * 3
    assert not {case["group"] for case in drawn} & {case["group"] for case in rest}


def test_a_table_for_bundles_is_made(tmp_path: Path, run: Run) -> None:
    (tmp_path / "images").mkdir()
    for line in LINES["endo"]:
        Image.new("L", (8, 8)).save(tmp_path / "images" / line.split(" ")[0])
    training, test = write(tmp_path / "train.txt", LINES["endo"][:2]), write(tmp_path / "test.txt", LINES["endo"][2:])
    out = tmp_path / "set"
    options = ["--training", str(training), "--test", str(test), "--out", str(out)]
    assert str(out / "labels.csv") in run("data", "medfmc", "endo", tmp_path / "images", *options)
    cases = load_image_list(out, "training", MEDFMC_CLASSES["endo"], multi_label=True)
    assert [case["label"].tolist() for case in cases] == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert all(Path(case["image"]).is_file() for case in cases)
    (case,) = load_image_list(out, "test", MEDFMC_CLASSES["endo"], multi_label=True)
    assert case["class_name"] == "ulcer|polyp"
    with (out / "labels.csv").open(encoding="utf-8", newline="") as file:
        assert [row["split"] for row in csv.DictReader(file)] == ["training", "training", "test"]


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("endo", "x.png 0 1 0", "line 1 of .* should be a file name and 4 labels of 0 and 1: 'x.png 0 1 0'"),
        ("endo", "x.png 0 1 0 2", "4 labels of 0 and 1"),
        ("chest", "x.png 0,1", "19 labels"),
        ("colon", "x.png", "a label of 0 or 1: 'x.png'"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path: Path, task: str, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_medfmc_list(write(tmp_path / "list", [line]), task)


def test_what_cannot_be_read_is_named_and_nothing_is_written(tmp_path: Path, run: Run) -> None:
    with pytest.raises(ValueError, match="task must be one of chest, colon, endo; got 'skin'"):
        read_medfmc_list(tmp_path / "list", "skin")
    with pytest.raises(DataError, match=r"none\.txt cannot be read"):
        read_medfmc_list(tmp_path / "none.txt", "endo")
    listed = write(tmp_path / "list", LINES["colon"])
    for options, message in (
        (["--training", str(listed)], "which is not there"),
        ([], "at least for one of them; got none"),
    ):
        assert message in error_of(run, "data", "medfmc", "colon", tmp_path, *options)
    assert not (tmp_path / "labels.csv").exists()
