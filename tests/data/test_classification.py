"""Lists of images by class: layouts, splits, draws and what is said of bad ones."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from monai_petl.data import DataError, few_shot_per_class, image_classes, load_image_list, require_images

BUSI = Path(__file__).parents[2] / "../shared/data/cls_busi"


def table(folder: Path, text: str) -> Path:
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return folder


def folders(root: Path, *names: str, count: int = 3) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (2, 2)).save(root / name / f"{i}.PNG")
        (root / name / "notes.txt").touch()
    return root


def test_a_table_with_sections_and_groups(tmp_path):
    table(
        tmp_path,
        "file,label,class_name,group,split\na.png,1,benign,g1,train\nb.png,0,normal,g2,val\nc.png,1,benign,,test\n",
    )
    assert image_classes(tmp_path) == ["normal", "benign"]  # by their numbers
    assert load_image_list(tmp_path) == [
        {"image": str(tmp_path / "a.png"), "label": 1, "class_name": "benign", "group": "g1"}
    ]
    assert [case["label"] for case in load_image_list(tmp_path, "validation")] == [0]
    assert load_image_list(tmp_path, "test")[0]["group"] == "c.png"
    assert load_image_list(tmp_path, class_names=["benign", "normal"])[0]["label"] == 0


def test_class_folders_with_and_without_sections(tmp_path):
    sections = folders(tmp_path / "a", "training/x", "training/y", "val/x", "test/y")
    assert image_classes(sections) == ["x", "y"]
    assert Counter(case["class_name"] for case in load_image_list(sections)) == {"x": 3, "y": 3}
    assert [case["label"] for case in load_image_list(sections, "validation")] == [0, 0, 0]
    plain = folders(tmp_path / "b", "x", "y", count=20)
    parts = {name: load_image_list(plain, name) for name in ("training", "validation", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"training": 28, "validation": 4, "test": 8}
    assert len({case["image"] for part in parts.values() for case in part}) == 40
    assert all(Counter(case["label"] for case in part)[0] == len(part) // 2 for part in parts.values())
    assert load_image_list(plain, seed=2) != parts["training"]


def test_groups_stay_together_in_a_drawn_split(tmp_path):
    """Patients have images of both classes, and some of one."""
    rows = "".join(f"{i}.png,{'ab'[(i * i // 3) % 2]},patient{i // 4}\n" for i in range(160))
    table(tmp_path, f"image,class,patient\n{rows}")
    parts = [load_image_list(tmp_path, name) for name in ("training", "validation", "test")]
    assert sum(map(len, parts)) == 160
    groups = [{case["group"] for case in part} for part in parts]
    assert all(groups)
    assert len(set.union(*groups)) == sum(map(len, groups))


def test_a_short_row_is_named(tmp_path):
    with pytest.raises(DataError, match=r"line 3 of .* has 1 cells, the header has 4: 'b.png'"):
        load_image_list(table(tmp_path, "file,class,label,split\na.png,x,1,train\nb.png\n"))


def test_dataset_json(tmp_path):
    contents = {
        "labels": {"0": "normal", "1": "benign"},
        "training": [{"image": "a.png", "label": 1}, {"image": "b.png", "label": "normal"}],
        "test": [{"image": "c.png", "label": 0}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
    assert image_classes(tmp_path) == ["normal", "benign"]
    found = load_image_list(tmp_path)
    assert [(case["label"], case["class_name"]) for case in found] == [(1, "benign"), (0, "normal")]
    contents["test"] = [{"image": "c.png"}]
    (tmp_path / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
    with pytest.raises(DataError, match="needs an image and the label of one class"):
        load_image_list(tmp_path)


def test_no_folder_is_an_empty_list(tmp_path):
    assert load_image_list(tmp_path / "none") == []
    assert image_classes(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,kind\na,b\n", "needs a column file or image or path and a column class_name"),
        ("file,class\na.png,\n", "line 2 of .* has no file or no class"),
        ("file,class,split\na.png,x,holdout\n", "line 2 of .* is in the section 'holdout'; known are training"),
    ],
)
def test_a_bad_table_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load_image_list(table(tmp_path, text))


def test_a_class_outside_the_list_is_named_with_an_image(tmp_path):
    table(tmp_path, "file,class,split\na.png,x,train\nb.png,z,train\n")
    with pytest.raises(DataError, match=r"class 'z', such as .*b\.png, which is none of the classes x, y"):
        load_image_list(tmp_path, class_names=["x", "y"])
    with pytest.raises(ValueError, match="section must be one of"):
        load_image_list(tmp_path, "train")


def cases(**counts: int) -> list[dict]:
    return [
        {"image": f"{name}{i}", "label": place, "class_name": name, "group": f"{name}{i // 2}"}
        for place, (name, count) in enumerate(counts.items())
        for i in range(count)
    ]


def test_draws_are_nested_and_of_every_class():
    there = cases(a=20, b=12)
    five, ten = few_shot_per_class(there, 5, 3), few_shot_per_class(there, 10, 3)
    assert Counter(case["class_name"] for case in five) == {"a": 5, "b": 5}
    assert {case["image"] for case in five} < {case["image"] for case in ten}
    assert few_shot_per_class(there, 5, 3) == five != few_shot_per_class(there, 5, 4)
    assert few_shot_per_class(there, None) == there


def test_near_copies_are_drawn_last():
    """Two images a group: six of twelve are all groups once."""
    for seed in range(5):
        drawn = few_shot_per_class(cases(a=12), 6, seed)
        assert len({case["group"] for case in drawn}) == 6


def test_draws_that_cannot_be_made_are_refused():
    with pytest.raises(DataError, match="5 images of each class were asked for, but there are 3 of b"):
        few_shot_per_class(cases(a=9, b=3), 5)
    with pytest.raises(ValueError, match="count must be positive"):
        few_shot_per_class(cases(a=9), 0)
    assert few_shot_per_class([], 5) == []


def test_what_a_training_needs(tmp_path):
    folders(tmp_path / "data", "training/x", "training/y")
    listed = load_image_list(tmp_path / "data")
    require_images(listed, tmp_path / "data", ["x", "y"])
    with pytest.raises(DataError, match=r"no image in .* is of the class z; found: x, y"):
        require_images(listed, tmp_path / "data", ["x", "z"])
    (tmp_path / "data" / "training" / "x" / "1.PNG").unlink()
    with pytest.raises(DataError, match=r"1 images that .* lists are not there, first .*1\.PNG"):
        require_images(listed, tmp_path / "data", ["x"])
    with pytest.raises(DataError, match="dataset_dir names no folder"):
        require_images([], tmp_path / "none", [])
    with pytest.raises(DataError, match="no images were found"):
        require_images([], tmp_path, [])


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "npy"])
@pytest.mark.parametrize("part", ["datalist", "validation"])
def test_a_file_that_was_cut_is_named_with_the_reason(tmp_path, suffix, part):
    """Half of a file has a header that is whole."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    paths = [tmp_path / f"{name}.{suffix}" for name in ("whole", "cut")]
    for path in paths:
        np.save(path, pixels) if suffix == "npy" else Image.fromarray(pixels).save(path)
        pixels = 255 - pixels
    lists = {"datalist": [{"image": str(paths[0])}], "validation": []}
    lists[part].append({"image": str(paths[1])})
    require_images(dataset_dir=tmp_path, **lists)
    paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size // 2])
    reason = "file size" if suffix == "npy" else "truncated"
    with pytest.raises(DataError, match=rf"cut\.{suffix} .*{reason}"):
        require_images(dataset_dir=tmp_path, **lists)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_of_decoding_is_shown_in_a_terminal_alone(tmp_path, capsys, monkeypatch, terminal):
    data = folders(tmp_path / "data", "training/x")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    require_images(load_image_list(data), data)
    assert ("images: " in capsys.readouterr().err) == terminal


def test_breast_ultrasound():
    if not BUSI.is_dir():
        pytest.skip("the ultrasound data are not here")
    assert image_classes(BUSI) == ["normal", "benign", "malignant"]
    parts = {name: load_image_list(BUSI, name) for name in ("training", "validation", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"training": 459, "validation": 76, "test": 227}
    require_images(parts["training"], BUSI, image_classes(BUSI))
    assert Counter(case["label"] for case in few_shot_per_class(parts["training"], 10)) == {0: 10, 1: 10, 2: 10}


def lines_in(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_several_classes_an_image_in_all_layouts(tmp_path):
    names = ["ulcer", "erosion", "polyp"]
    joined = lines_in(tmp_path / "a", "file,class_name,split", "1.png,polyp|ulcer,train", "2.png,,train")
    columns = lines_in(tmp_path / "b", "file,ulcer,erosion,polyp,split", "1.png,1,0,1,train", "2.png,0,0,0,train")
    (tmp_path / "c").mkdir()
    listed = {"labels": {"0": "ulcer", "1": "erosion", "2": "polyp"}}
    listed["training"] = [{"image": "1.png", "label": [2, "ulcer"]}, {"image": "2.png", "label": []}]
    (tmp_path / "c" / "dataset.json").write_text(json.dumps(listed), encoding="utf-8")
    for folder in (joined, columns, tmp_path / "c"):
        cases = load_image_list(folder, "training", names, multi_label=True)
        assert [case["label"].tolist() for case in cases] == [[1, 0, 1], [0, 0, 0]]
        assert [case["class_name"] for case in cases] == ["ulcer|polyp", ""]


def test_labels_of_another_form_are_named(tmp_path, caplog):
    columns = lines_in(tmp_path / "b", "file,ulcer,polyp,split", "1.png,1,1,train", "2.png,0,0,train")
    with pytest.raises(
        DataError, match=r"needs one of 0 and 1 for each of class_names; there is none for erosion. It has file"
    ):
        load_image_list(columns, "training", ["ulcer", "erosion"], multi_label=True)
    with pytest.raises(DataError, match="for each of class_names; give class_names"):
        load_image_list(columns, "training", multi_label=True)
    assert len(load_image_list(columns, "training", ["ulcer"], multi_label=True)) == 2
    assert "the columns 'polyp' are not read" in caplog.text
    (tmp_path / "c").mkdir()
    contents = {"training": [{"image": "1.png", "label": [0, 0, 1]}]}
    (tmp_path / "c" / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"has the label \[0, 0, 1\] for 1.png; give the names or numbers of the image's classes, each"
    ):
        load_image_list(tmp_path / "c", "training", ["0", "1", "2"], multi_label=True)


def test_classes_that_are_numbers_come_in_their_order(tmp_path):
    lines = [f"{n}.png,{n},train" for n in range(12)]
    assert image_classes(lines_in(tmp_path / "a", "file,class_name,split", *lines)) == [str(n) for n in range(12)]
