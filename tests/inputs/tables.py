"""Images with their classes: tables, folders, and what lies beside."""

from __future__ import annotations

import codecs
import json
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from monai_petl.data import image_classes, load_image_list, require_images
from monai_petl.data.datalist import SECTIONS
from tests.inputs import Input

TABLES, FOLDERS, LISTS = "Tables of images", "Folders of images", "Lists of images (dataset.json)"
ROWS = [
    f"{index}.png,{'ab'[index % 2]},{split}" for index, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2)
]


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16), np.uint8)).save(path)


def table(
    rows: Sequence[str] = ROWS,
    header: str = "file,class_name,split",
    encode: str = "utf-8",
    end: str = "\n",
    names: Any = ("a", "b"),
) -> Callable[[Path], None]:
    """Eight pictures of two classes in three sections."""

    def check(folder: Path) -> None:
        for index in range(8):
            picture(folder / f"{index}.png", index)
        mark = codecs.BOM_UTF16_LE if encode == "utf-16-le" else b""
        (folder / "labels.csv").write_bytes(mark + end.join([header, *rows, ""]).encode(encode))
        lists = {section: load_image_list(folder, section, names) for section in SECTIONS}
        assert {section: len(cases) for section, cases in lists.items()} == {"training": 4, "validation": 2, "test": 2}
        assert [case["label"] for case in lists["training"]] == [0, 1, 0, 1]
        require_images(lists["training"], folder, names, lists["validation"])

    return check


def swap(separator: str, rows: Sequence[str] = ROWS) -> list[str]:
    return [row.replace(",", separator) for row in rows]


def first(row: str) -> list[str]:
    return [row, *ROWS[1:]]


def folders(beside: Callable[[Path], Any], names: Sequence[str] = ("train", "val", "test")) -> Callable[[Path], None]:
    """Class folders in section folders, with something beside."""

    def check(folder: Path) -> None:
        for place, section in enumerate(names):
            for index in range(4):
                picture(folder / section / "ab"[index % 2] / f"{index}.png", 10 * place + index)
        beside(folder)
        assert image_classes(folder) == ["a", "b"]
        training = load_image_list(folder, "training", ["a", "b"])
        assert len(training) == 4
        require_images(training, folder, ["a", "b"], load_image_list(folder, "validation", ["a", "b"]))

    return check


def unicode_names(folder: Path) -> None:
    name = unicodedata.normalize("NFD", "pä.png")
    table()(folder)
    (folder / "0.png").rename(folder / name)
    (folder / "labels.csv").write_text(
        "\n".join(["file,class_name,split", *first(f"{unicodedata.normalize('NFC', name)},a,train"), ""]),
        encoding="utf-8",
    )
    require_images(load_image_list(folder, "training", ["a", "b"]), folder)


def unlisted(folder: Path) -> None:
    picture(folder / "9.png", 9)
    table()(folder)


def touch(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")

    return make


def same_picture(folder: Path) -> None:
    (folder / "val" / "a" / "copy.png").write_bytes((folder / "train" / "a" / "0.png").read_bytes())


def named(name: str) -> Callable[[Path], None]:
    """The table under another name."""

    def check(folder: Path) -> None:
        table()(folder)
        (folder / "labels.csv").rename(folder / name)
        assert [case["label"] for case in load_image_list(folder, "training", ["a", "b"])] == [0, 1, 0, 1]

    return check


def capitals(folder: Path) -> None:
    (folder / "labels.csv").write_text("\n".join([HEAD, *ROWS[:7], "7.png,B,test", ""]), encoding="utf-8")
    assert image_classes(folder) == ["B", "a", "b"]


def numbered(text: Callable[[int], str]) -> Callable[[Path], None]:
    """Classes that are numbers alone: 1.0 is 1."""
    rows = [row.replace(f",{'ab'[i % 2]},", f",{text(i)},") for i, row in enumerate(ROWS)]

    def check(folder: Path) -> None:
        table(rows, "file,label,split", names=())(folder)
        assert image_classes(folder) == ["0", "1"]

    return check


CASES = [{"image": f"{index}.png", "label": index % 2} for index in range(8)]
LISTED = {"labels": {"0": "a", "1": "b"}, "training": CASES[:4], "validation": CASES[4:6], "test": CASES[6:]}


def listed(encode: str = "utf-8", **changes: Any) -> Callable[[Path], None]:
    """Eight pictures in a ``dataset.json``."""

    def check(folder: Path) -> None:
        for index in range(8):
            picture(folder / f"{index}.png", index)
        (folder / "dataset.json").write_bytes(json.dumps({**LISTED, **changes}).encode(encode))
        lists = {section: load_image_list(folder, section) for section in SECTIONS}
        assert {section: len(cases) for section, cases in lists.items()} == {"training": 4, "validation": 2, "test": 2}
        assert [(case["label"], case["class_name"]) for case in lists["training"]] == [(0, "a"), (1, "b")] * 2
        require_images(lists["training"], folder, ["a", "b"], lists["validation"])

    return check


def no_training(folder: Path) -> None:
    """Sections are recognised by the class folders in them."""
    for place, name in enumerate(("val/a", "val/b", "test/a", "test/b", "notes")):
        picture(folder / name / "0.png", place)
    assert image_classes(folder) == ["a", "b"]
    assert [len(load_image_list(folder, section)) for section in SECTIONS] == [0, 2, 2]


HEAD = "file,class_name,split"
INPUTS = [
    Input(TABLES, "commas, UTF-8", table()),
    Input(TABLES, "semicolons, as spreadsheets write them in Europe", table(swap(";"), HEAD.replace(",", ";"))),
    Input(TABLES, "tabs", table(swap("\t"), HEAD.replace(",", "\t"))),
    Input(TABLES, "a byte-order mark", table(encode="utf-8-sig")),
    Input(TABLES, "UTF-16", table(encode="utf-16-le")),
    Input(TABLES, "Windows line ends and empty lines", table([*ROWS, "", " "], end="\r\n")),
    Input(TABLES, "names of columns in capitals, blanks around cells", table(
        [row.replace(",", " , ") for row in ROWS], "File, CLASS_NAME ,Split")),
    Input(TABLES, "`Train ` for a section", table([row.replace("train", "Train ") for row in ROWS])),
    Input(TABLES, "quoted cells", table([f'"{row.replace(",", chr(34) + "," + chr(34))}"' for row in ROWS])),
    Input(TABLES, "letters in another Unicode form than the file's", unicode_names),
    Input(TABLES, "class numbers as `0.0` and `1.0` beside names", table(
        [f"{row},{float(i % 2)}" for i, row in enumerate(ROWS)], f"{HEAD},label", names=())),
    Input(TABLES, "columns that are not known", table([f"{row},x,y" for row in ROWS], f"{HEAD},site,age"),
          says=("'site', 'age'", "not read")),
    Input(TABLES, "Latin-1 with umlauts", table([*ROWS, "8.png,ü,train"], encode="latin-1"), True, ("labels.csv", "UTF-8")),
    Input(TABLES, "a row longer than the header", table(first("0.png,a,train,x")), True, ("line 2", "4 cells", "has 3")),
    Input(TABLES, "a row shorter than the header", table(first("0.png,a")), True, ("line 2", "2 cells")),
    Input(TABLES, "an open quote", table(first('"0.png,a,train')), True, ("labels.csv",)),
    Input(TABLES, "two columns of one name", table([f"{row},x" for row in ROWS], f"{HEAD},File"), True, ("two columns 'file'",)),
    Input(TABLES, "one picture with two classes", table([*ROWS, "0.png,b,train"]), True,
          ("lines 2 and 10", "0.png is of the class 'a' and 'b'")),
    Input(TABLES, "one picture in two sections", table([*ROWS, "0.png,a,test"]), True, ("in the section 'training' and 'test'",)),
    Input(TABLES, "one number for two classes", table([f"{row},0" for row in ROWS], f"{HEAD},label"), True,
          ("contradict each other", "label 0 is 'a'")),
    Input(TABLES, "an unknown section", table(first("0.png,a,holdout")), True, ("line 2", "'holdout'")),
    Input(TABLES, "a picture that is not there", table(first("none.png,a,train")), True, ("none.png",)),
    Input(TABLES, "a class that `class_names` lacks", table(names=["a"]), True, ("'b'", "class_names")),
    Input(TABLES, "`class_names` as a text", table(names="liver"), True, ("class_names must be a list", "['liver']")),
    Input(TABLES, "a class that is named twice", table(names=["a", "a", "b"]), True, ("'a' stands there twice",)),
    Input(TABLES, "`sep=;` in the first line", table(["file;class_name;split", *swap(";")], "sep=;")),
    Input(TABLES, "line ends of old Macs", table(end="\r")),
    Input(TABLES, "backslashes in paths", table([f".\\{row}" for row in ROWS])),
    Input(TABLES, "characters of no width in cells", table([row.replace(",a,", ",a\u200b,") for row in ROWS])),
    Input(TABLES, "`Labels.CSV`", named("Labels.CSV")),
    Input(TABLES, "numbers as classes, `0.0` and `1.0`", numbered(lambda i: f"{i % 2}.0"), says=("0.0, 1.0 are read as whole",)),
    Input(TABLES, "numbers as classes, `1` and `1.0`", numbered(lambda i: str(i % 2) if i < 4 else f"{i % 2}.0"),
          says=("0, 0.0, 1, 1.0 are read as whole",)),
    Input(TABLES, "a row that stands there twice", table([*ROWS, ROWS[0]]), says=("lists 1 images once more", "line 10 (0.png)")),
    Input(TABLES, "columns `class` and `label` of equal names", table([f"{row},{row.split(',')[1]}" for row in ROWS],
                                                                     f"{HEAD},label")),
    Input(TABLES, "columns `class` and `label` that contradict each other", table([f"{row},a" for row in ROWS], f"{HEAD},label"),
          True, ("line 3", "'b'", "the label 'a'", "keep one")),
    Input(TABLES, "a column `label` of other names", table([f"{row},grade" for row in ROWS], f"{HEAD},label"),
          says=("'label' has names other than", "not read")),
    Input(TABLES, "classes that differ in capitals alone", capitals,
          says=("'B', 'b', which differ in capitals",)),
    Input(TABLES, "a header without rows", table([]), True, ("labels.csv has no rows",)),
    Input(TABLES, "an empty file", table([], ""), True, ("labels.csv has no rows",)),
    Input(TABLES, "UTF-16 without a byte-order mark", table(encode="utf-16-be"), True, ("labels.csv", "zero bytes", "UTF-8")),
    Input(LISTS, "UTF-8", listed()),
    Input(LISTS, "a byte-order mark", listed("utf-8-sig")),
    Input(LISTS, "UTF-16", listed("utf-16")),
    Input(LISTS, "names to numbers, as nnU-Net has them", listed(labels={"a": 0, "b": 1})),
    Input(LISTS, "class numbers as 0.0 and 1.0", listed(training=[{**case, "label": float(case["label"])} for case in CASES[:4]])),
    Input(LISTS, "`val` for a section", listed(validation=[], val=CASES[4:6])),
    Input(LISTS, "an entry that is no section", listed(holdout=[]), says=("'holdout'", "not read")),
    Input(LISTS, "a case that stands there twice", listed(training=[*CASES[:4], CASES[0]]), says=("case 5 of 'training' (0.png)",)),
    Input(LISTS, "a case with two classes", listed(training=[*CASES[:4], {"image": "0.png", "label": 1}]), True,
          ("case 1 of 'training' and case 5 of 'training'", "of the class 'a' and 'b'")),
    Input(LISTS, "a case in two sections", listed(test=CASES[:2]), True, ("in the section 'training' and 'test'",)),
    Input(LISTS, "a number that `labels` lacks", listed(test=[{"image": "6.png", "label": 7}]), True, ("'7'", "6.png", "1 (b)")),
    Input(LISTS, "a name that `labels` lacks", listed(test=[{"image": "6.png", "label": "c"}]), True, ("'c'", "6.png", "1 (b)")),
    Input(LISTS, "true for a label", listed(test=[{"image": "6.png", "label": True}]), True, ("True", "6.png", "whole number")),
    Input(LISTS, "null for a label", listed(test=[{"image": "6.png", "label": None}]), True, ("the label of one class",)),
    Input(LISTS, "`labels` as a list", listed(labels=["a", "b"]), True, ("dataset.json must map numbers to names",)),
    Input(LISTS, "two numbers of one name", listed(labels={"0": "a", "1": "a"}), True, ("gives a name or a number twice",)),
    Input(LISTS, "a section that is no list", listed(training=None), True, ("'training'", "list of cases")),
    Input(FOLDERS, "`__MACOSX` from an archive", folders(touch("__MACOSX/train/._0.png")), says=("1 files", "__MACOSX")),
    Input(FOLDERS, "another folder with pictures", folders(lambda root: picture(root / "notes" / "x.png", 99)),
          says=("notes/x.png (in no list and no folder of a class)",)),
    Input(FOLDERS, "`Thumbs.db`", folders(touch("train/a/Thumbs.db")), says=("Thumbs.db (left by an operating system)",)),
    Input(FOLDERS, "hidden files", folders(touch("train/a/.0.png")), says=("train/a/.0.png (hidden)",)),
    Input(FOLDERS, "another ending", folders(touch("train/a/0.txt")), says=("train/a/0.txt (no ending of an image)",)),
    Input(FOLDERS, "a folder in the folder of a class", folders(lambda root: picture(root / "train/a/more/0.png", 99)),
          says=("train/a/more/0.png",)),
    Input(FOLDERS, "a link to nothing", folders(lambda root: os.symlink("/nowhere/x.png", root / "train/a/z.png")),
          says=("train/a/z.png (a link to nothing)",)),
    Input(FOLDERS, "a link to itself", folders(lambda root: os.symlink("z.png", root / "train/a/z.png")),
          says=("train/a/z.png (a link to nothing)",)),
    Input(FOLDERS, "a link to the folder above", folders(lambda root: os.symlink("..", root / "train/a/up")),
          says=("train/a/up (a link to a folder)",)),
    Input(FOLDERS, "an empty folder of a class", folders(lambda root: (root / "train/c").mkdir()), says=("are empty", "train/c")),
    Input(FOLDERS, "a table in another format", folders(touch("labels.xlsx")), says=("labels.xlsx (a table; save it as labels.csv)",)),
    Input(FOLDERS, "sections in capitals", folders(lambda root: None, ("Train", "VAL", "Test"))),
    Input(FOLDERS, "no section for training, and another folder", no_training, says=("notes/0.png",)),
    Input(FOLDERS, "a picture that the table does not list", unlisted, says=("9.png (in no list and no folder of a class)",)),
    Input(FOLDERS, "the same content in two sections", folders(same_picture), True, ("the same content",)),
]  # fmt: skip
