"""Images with their classes: tables, folders, and what lies beside."""

from __future__ import annotations

import codecs
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

TABLES, FOLDERS = "Tables of images", "Folders of images"
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
    Input(FOLDERS, "a picture that the table does not list", unlisted, says=("9.png (in no list and no folder of a class)",)),
    Input(FOLDERS, "the same content in two sections", folders(same_picture), True, ("the same content",)),
]  # fmt: skip
