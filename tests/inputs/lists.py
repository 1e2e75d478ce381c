"""Data sets of volumes: names, lists, files that lie beside, and cases in two sections."""

from __future__ import annotations

import codecs
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from monai_petl.data import check_dataset, check_images, check_training_data, class_names, load_datalist
from monai_petl.data.datalist import SECTIONS
from tests.inputs import Input
from tests.volumes import dataset, plain_folders, save, volume

LISTS, NAMES, LEAKS, OUTPUTS = "Data lists: files", "Data lists: names", "Data lists: sections", "Data lists: inference"


def count(root: Path) -> int:
    return sum(len(load_datalist(root, section)) for section in SECTIONS)


def beside(make: Callable[[Path], Any], cases: int = 5) -> Callable[[Path], None]:
    """Something more in plain folders of five cases; the check says the same as the run."""

    def check(folder: Path) -> None:
        root = plain_folders(folder)
        make(root)
        assert count(root) == cases
        report = check_dataset(root)
        assert not [problem for problem in report.problems if "no partner" not in problem]

    return check


def rewritten(
    change: Callable[[dict[str, Any]], None] = lambda contents: None, encode: str = "utf-8"
) -> Callable[[Path], None]:
    """``dataset.json`` with changes, in an encoding; four cases are read, and may be trained on."""

    def check(folder: Path) -> None:
        root = dataset(folder)
        contents = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        change(contents)
        text = json.dumps(contents, ensure_ascii=False, indent=1).replace("\n", "\r\n")
        mark = codecs.BOM_UTF16_BE if encode == "utf-16-be" else b""
        (root / "dataset.json").write_bytes(mark + text.encode(encode))
        assert count(root) == 4
        assert class_names(root) == {"liver": 1, "spleen": 2}
        check_training_data(load_datalist(root), root, ["liver"], load_datalist(root, "validation"))

    return check


def classes(names: object) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        root = dataset(folder)
        check_training_data(load_datalist(root), root, names)  # type: ignore[arg-type]

    return check


def unicode_forms(folder: Path) -> None:
    root = plain_folders(folder)
    for kind, form in (("images", "NFC"), ("labels", "NFD")):
        (root / kind / "c0.nii.gz").rename(root / kind / (unicodedata.normalize(form, "pä 0") + ".nii.gz"))
    assert count(root) == 5
    assert check_dataset(root).ok


def nnunet(folder: Path) -> None:
    root = folder
    for index in range(5):
        save(root / "imagesTr" / f"c{index}_0000.nii.gz", volume(index)[0])
        save(root / "labelsTr" / f"c{index}.nii.gz", volume(index)[1])
    contents = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}, "numTraining": 5}
    (root / "dataset.json").write_text(json.dumps({**contents, "file_ending": ".nii.gz"}), encoding="utf-8")
    assert count(root) == 5
    assert check_dataset(root).ok


def two_channels(folder: Path) -> None:
    nnunet(folder)
    save(folder / "imagesTr" / "c0_0001.nii.gz", volume()[0])
    count(folder)


def leak(second: Callable[[Path, dict[str, Any]], dict[str, Any]], evaluate: bool = False) -> Callable[[Path], None]:
    """A case for validation that is made from the first one for training."""

    def check(folder: Path) -> None:
        root = dataset(folder)
        contents = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
        contents["validation"] = [second(root, contents["training"][0])]
        (root / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
        assert any("sections must not share a case" in problem for problem in check_dataset(root).problems)
        check_training_data(load_datalist(root), root, ["liver"], load_datalist(root, "validation"))

    return check


def linked(root: Path, case: dict[str, Any]) -> dict[str, Any]:
    os.symlink(root / case["image"], root / "link.nii.gz")
    return {**case, "image": "link.nii.gz"}


def unpacked(root: Path, case: dict[str, Any]) -> dict[str, Any]:
    save(root / "copy.nii", volume(0)[0])
    return {**case, "image": "copy.nii"}


def copied(root: Path, case: dict[str, Any]) -> dict[str, Any]:
    (root / "copy.nii.gz").write_bytes((root / case["image"]).read_bytes())
    return {**case, "image": "copy.nii.gz"}


def patient(root: Path, case: dict[str, Any]) -> dict[str, Any]:
    contents = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    case["patient_id"] = 7
    return {**contents["test"][0], "patient_id": 7}


def inputs(*names: str) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        paths = [save(folder / name, volume(index)[0]) for index, name in enumerate(names)]
        check_images([{"image": str(path)} for path in paths], folder, images=f"{folder}/*")

    return check


def text(root: Path) -> None:
    (root / "images" / "notes.txt").write_text("x", encoding="utf-8")


def mac_folders(root: Path) -> None:
    (root / "images" / "__MACOSX").mkdir()
    (root / "labels" / "._c0.nii.gz").write_bytes(b"x")
    (root / "images" / ".DS_Store").write_bytes(b"x")


def set_labels(**table: Any) -> Callable[[dict[str, Any]], None]:
    return lambda contents: contents.update(labels=table)


def windows_paths(contents: dict[str, Any]) -> None:
    for case in contents["training"]:
        case.update({kind: case[kind].replace("/", "\\") for kind in ("image", "label")})


def not_listed(folder: Path) -> None:
    root = dataset(folder)
    save(root / "imagesTr" / "c9.nii.gz", volume(9)[0])
    assert count(root) == 4
    assert check_dataset(root).left_out == ["imagesTr/c9.nii.gz (not in dataset.json)"]


def one_slice_more(root: Path) -> None:
    save(root / "labels" / "c0.nii", np.zeros_like(volume()[1]))


INPUTS = [
    Input(LISTS, "`.NII.GZ` beside `.nii.gz`", beside(lambda root: [
        (root / kind / "c0.nii.gz").rename(root / kind / "c0.NII.GZ") for kind in ("images", "labels")])),
    Input(LISTS, "a text file", beside(text), says=("1 files", "images/notes.txt (no ending of a volume)")),
    Input(LISTS, "`__MACOSX`, `._` files and `.DS_Store`", beside(mac_folders),
          says=("3 files", "labels/._c0.nii.gz", "left by an operating system")),
    Input(LISTS, "a hidden file", beside(lambda root: (root / "labels" / ".c9.nii.gz").touch()), says=(".c9.nii.gz (hidden)",)),
    Input(LISTS, "a link to nothing", beside(lambda root: os.symlink("/nowhere/a", root / "images" / "z.nii.gz")),
          says=("images/z.nii.gz (a link to nothing)",)),
    Input(LISTS, "a folder without DICOM files", beside(lambda root: (root / "images" / "old").mkdir()),
          says=("images/old (a folder without a DICOM series)",)),
    Input(LISTS, "an image without a label", beside(lambda root: (root / "labels" / "c4.nii.gz").unlink(), 4),
          says=("1 files", "no partner", "images/c4.nii.gz")),
    Input(LISTS, "a label without an image", beside(lambda root: (root / "images" / "c4.nii.gz").unlink(), 4),
          says=("no partner", "labels/c4.nii.gz")),
    Input(LISTS, "`c0.nii` beside `c0.nii.gz`", beside(one_slice_more), True, ("c0.nii and c0.nii.gz", "keep one")),
    Input(LISTS, "a file that `dataset.json` does not list", not_listed, says=("imagesTr/c9.nii.gz (not in dataset.json)",)),
    Input(LISTS, "a folder as nnU-Net has it", nnunet),
    Input(LISTS, "a second channel, `_0001`", two_channels, True, ("c0_0001.nii.gz", "channel")),
    Input(NAMES, "composed and decomposed letters (NFC and NFD)", unicode_forms),
    Input(NAMES, "`dataset.json` with a byte-order mark", rewritten(encode="utf-8-sig")),
    Input(NAMES, "`dataset.json` in UTF-16", rewritten(encode="utf-16")),
    Input(NAMES, "`dataset.json` in UTF-16, big-endian", rewritten(encode="utf-16-be")),
    Input(NAMES, "`dataset.json` in Latin-1 with umlauts", rewritten(lambda contents: contents.update(
        name="Nährstoffe"), "latin-1"), True, ("dataset.json cannot be read as JSON", "UTF-8")),
    Input(NAMES, "paths with backslashes", rewritten(windows_paths)),
    Input(NAMES, "paths with `..`", rewritten(lambda contents: contents["training"][0].update(
        image="imagesTr/../imagesTr/c0.nii.gz"))),
    Input(NAMES, "a table from names to values, with the background", rewritten(set_labels(background=0, liver=1, spleen=2))),
    Input(NAMES, "two classes of one value", rewritten(set_labels(liver=1, spleen=1)), True, ("a name or a value twice",)),
    Input(NAMES, "a background that is not 0", rewritten(set_labels(background=1, liver=2)), True, ("background is 0",)),
    Input(NAMES, "a section that is no list", rewritten(lambda contents: contents.update(test="c9.nii.gz")),
          True, ("test in", "must be a list of cases")),
    Input(NAMES, "a case with two images", rewritten(lambda contents: contents["training"][0].update(image=["a", "b"])),
          True, ("the path of one image",)),
    Input(NAMES, "`class_names` as a text", classes("liver"), True, ("class_names must be a list", "['liver']")),
    Input(NAMES, "a class that is named twice", classes(["liver", "liver"]), True, ("'liver' stands there twice",)),
    Input(NAMES, "a class that the data set does not have", classes(["Liver "]), True,
          ("no class named Liver", "liver, spleen")),
    Input(LEAKS, "one file in two sections", leak(lambda root, case: case), True, ("c0.nii.gz (the same file)",)),
    Input(LEAKS, "one file, by a link", leak(linked), True, ("link.nii.gz", "the same file")),
    Input(LEAKS, "a copy of a file", leak(copied), True, ("copy.nii.gz", "the same content")),
    Input(LEAKS, "an unpacked copy of a file", leak(unpacked), True, ("copy.nii", "the same content")),
    Input(LEAKS, "two images of one patient (`patient_id`)", leak(patient), True, ("one patient",)),
    Input(OUTPUTS, "two images of one name in two folders", inputs("a/x.nii.gz", "b/x.nii.gz"), True, ("segmented as x",)),
    Input(OUTPUTS, "`x.nii` and `x.nii.gz`", inputs("x.nii", "x.nii.gz"), True, ("segmented as x",)),
    Input(OUTPUTS, "`x.nrrd` and `X.nii.gz`", inputs("x.nrrd", "X.nii.gz"), True, ("would both be segmented",)),
    Input(OUTPUTS, "`1.2.3` and `1.2.4`, folders of DICOM series", inputs("1.2.3.dcm", "1.2.4.dcm")),
]  # fmt: skip
