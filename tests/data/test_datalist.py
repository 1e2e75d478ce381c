from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from monai_petl.data import DataError, class_names, few_shot, load_datalist, require_data, split_cases

SECTIONS = ("training", "validation", "test")
HIPPOCAMPUS = Path(__file__).parents[2] / "../shared/data/mr_hippocampus"


def plain(root: Path, images: str, labels: str | None, count: int, ending: str = ".nii.gz") -> Path:
    for folder in filter(None, (images, labels)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            (root / folder / f"case_{index:02d}{ending}").touch()
    return root


def decathlon(root: Path, **contents: object) -> Path:
    (root / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
    return root


def names(cases: list[dict[str, str]]) -> list[str]:
    return [Path(case["image"]).name for case in cases]


def test_a_decathlon_file_is_taken_as_it_stands(tmp_path):
    entry = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz", "subject": "7"}
    decathlon(tmp_path, training=[entry], validation=[entry], test=["./imagesTs/b.nii.gz"])
    a = {
        "image": str(tmp_path / "imagesTr/a.nii.gz"),
        "label": str(tmp_path / "labelsTr/a.nii.gz"),
        "subject": "7",
    }
    assert load_datalist(tmp_path) == [a]
    assert load_datalist(tmp_path, "validation") == [a]
    assert load_datalist(tmp_path, "test") == [{"image": str(tmp_path / "imagesTs/b.nii.gz")}]


def test_a_decathlon_file_without_validation_sets_one_case_in_eight_aside(tmp_path):
    entries = [{"image": f"imagesTr/{i}.nii.gz", "label": f"labelsTr/{i}.nii.gz"} for i in range(16)]
    decathlon(tmp_path, training=entries, test=[])
    training, validation = load_datalist(tmp_path, "training"), load_datalist(tmp_path, "validation")
    assert (len(training), len(validation)) == (14, 2)
    assert {*names(training), *names(validation)} == {f"{i}.nii.gz" for i in range(16)}


@pytest.mark.parametrize("part", ["", "Tr"])
def test_plain_folders_are_split_and_the_split_does_not_change(tmp_path, part):
    plain(tmp_path, f"images{part}", f"labels{part}", 20)
    lists = {section: load_datalist(tmp_path, section) for section in SECTIONS}
    assert {section: len(cases) for section, cases in lists.items()} == {"training": 14, "validation": 2, "test": 4}
    assert len({name for cases in lists.values() for name in names(cases)}) == 20
    assert lists == {section: load_datalist(tmp_path, section) for section in SECTIONS}
    assert lists["test"] != load_datalist(tmp_path, "test", seed=2)
    assert all(Path(case["image"]).name == Path(case["label"]).name for cases in lists.values() for case in cases)


def test_a_folder_of_test_images_is_the_test_section(tmp_path):
    plain(tmp_path, "imagesTr", "labelsTr", 8)
    plain(tmp_path, "imagesTs", None, 3)
    (tmp_path / "labelsTs").mkdir()
    (tmp_path / "labelsTs/case_01.nii.gz").touch()
    assert [len(load_datalist(tmp_path, section)) for section in SECTIONS] == [7, 1, 3]
    assert ["label" in case for case in load_datalist(tmp_path, "test")] == [False, True, False]


def test_images_without_labels_are_test_cases(tmp_path):
    plain(tmp_path, "images", None, 3, ".mha")
    assert [len(load_datalist(tmp_path, section)) for section in SECTIONS] == [0, 0, 3]


def test_channel_endings_and_hidden_files_do_not_hinder_pairing(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    for name in ("imagesTr/a_0000.nii.gz", "imagesTr/._a.nii.gz", "imagesTr/notes.txt", "labelsTr/a.nii.gz"):
        (tmp_path / name).touch()
    (case,) = load_datalist(tmp_path)
    assert Path(case["image"]).name == "a_0000.nii.gz"


def test_files_without_partner_are_left_out_with_a_warning(tmp_path, caplog):
    plain(tmp_path, "images", "labels", 2)
    (tmp_path / "images/alone.nii.gz").touch()
    assert "alone.nii.gz" not in [name for section in SECTIONS for name in names(load_datalist(tmp_path, section))]
    assert "alone.nii.gz" in caplog.text


def test_no_subject_is_in_two_sections(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        for subject in range(10):
            for visit in range(3):
                (tmp_path / folder / f"p{subject}_v{visit}.nii.gz").touch()
    subjects = [
        {name[:2] for name in names(load_datalist(tmp_path, section, subject_pattern=r"^(p\d+)_"))}
        for section in SECTIONS
    ]
    assert [len(part) for part in subjects] == [7, 1, 2]
    assert not subjects[0] & subjects[1] | subjects[0] & subjects[2] | subjects[1] & subjects[2]


def test_an_absent_folder_gives_an_empty_list_and_then_a_clear_sentence(tmp_path):
    folder = tmp_path / "nowhere"
    assert load_datalist(folder) == []
    assert class_names(folder) == {}
    assert few_shot([], 3) == []
    with pytest.raises(DataError, match=r"dataset_dir names no folder: .*nowhere.*--dataset_dir"):
        require_data([], folder)


def test_an_empty_list_and_an_unknown_class_are_explained(tmp_path):
    decathlon(tmp_path, labels={"0": "background", "1": "liver"}, training=[])
    with pytest.raises(DataError, match="no cases were found in dataset_dir"):
        require_data([], tmp_path)
    require_data([{"image": "a"}], tmp_path, ["liver"])
    with pytest.raises(DataError, match="no class named kidney; its classes are liver"):
        require_data([{"image": "a"}], tmp_path, ["liver", "kidney"])


def test_it_is_evaluated_in_a_configuration(tmp_path):
    plain(tmp_path, "images", "labels", 10)
    parser = ConfigParser(
        {
            "imports": ["$from monai_petl.data import load_datalist"],
            "dataset_dir": str(tmp_path),
            "datalist": "$load_datalist(@dataset_dir, 'training')",
        }
    )
    assert len(parser.get_parsed_content("datalist")) == 7


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"training": [{"label": "a.nii"}]}', '{"training": [{"image": ["a", "b"]}]}']
)
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset\.json"):
        load_datalist(tmp_path)


def test_an_unknown_section_is_refused(tmp_path):
    with pytest.raises(ValueError, match="training, validation, test"):
        load_datalist(tmp_path, "train")


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("dataset.json", {"labels": {"0": "background", "2": "spleen", "1": "liver"}}),
        ("dataset.json", {"labels": {"background": 0, "liver": 1, "spleen": 2}}),
        ("labels.json", {"labels": {"1": "liver", "2": "spleen"}, "note": "merged"}),
        ("labels.json", {"1": "liver", "2": "spleen"}),
    ],
)
def test_class_names_are_read_in_both_directions(tmp_path, file, contents):
    (tmp_path / file).write_text(json.dumps(contents), encoding="utf-8")
    assert list(class_names(tmp_path).items()) == [("liver", 1), ("spleen", 2)]


def test_without_a_folder_classes_are_numbered_in_their_order(tmp_path):
    assert class_names(tmp_path / "none", ["liver", "spleen"]) == {"liver": 1, "spleen": 2}
    assert class_names(tmp_path, ["liver", "spleen"]) == {}  # a folder without a table says nothing of its labels


@pytest.mark.parametrize("labels", [{"1": "liver", "2": "liver"}, {"liver": "one"}, ["liver"], {"a": 1, "b": 1}])
def test_an_ambiguous_table_of_classes_is_refused(tmp_path, labels):
    decathlon(tmp_path, labels=labels)
    with pytest.raises(DataError, match="table of labels"):
        class_names(tmp_path)


def test_two_sources_of_43_and_47_cases_give_61_10_19():
    groups = {"tcia": [f"t{i}" for i in range(43)], "btcv": [f"b{i}" for i in range(47)]}
    split = split_cases(groups, seed=1)
    assert [len(split[section]) for section in SECTIONS] == [61, 10, 19]
    assert [sum(case[0] == "t" for case in split[section]) for section in SECTIONS] == [29, 5, 9]
    assert [len(part) for part in split_cases({"": range(140)}).values()] == [98, 14, 28]
    assert [len(part) for part in split_cases({"": range(139)}).values()] == [97, 14, 28]


@given(st.integers(1, 60), st.integers(0, 5), st.randoms())
def test_a_split_is_a_partition_that_ignores_the_order_of_the_list(count, seed, random):
    cases = [f"c{i}" for i in range(count)]
    shuffled = random.sample(cases, count)
    split, again = split_cases({"": cases}, seed), split_cases({"": shuffled}, seed)
    assert sorted(case for part in split.values() for case in part) == sorted(cases)
    assert all(sorted(split[section]) == sorted(again[section]) for section in SECTIONS)
    assert split["training"]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_draws_are_nested(first, second, seed):
    cases = [f"c{i}" for i in range(30)]
    small, large = sorted((first, second))
    assert set(few_shot(cases, small, seed)) <= set(few_shot(cases, large, seed))
    assert len(few_shot(cases, small, seed)) == small
    assert few_shot(cases, None) == cases


def test_too_large_and_senseless_draws_are_refused():
    with pytest.raises(DataError, match="10 cases were asked for, but the data list holds 3"):
        few_shot(["a", "b", "c"], 10)
    with pytest.raises(ValueError, match="positive"):
        few_shot(["a"], 0)


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus volumes are not at hand")
def test_real_decathlon_data_is_listed():
    cases = load_datalist(HIPPOCAMPUS)
    assert len(cases) == 140
    assert all(Path(path).is_file() for path in cases[0].values())
    assert class_names(HIPPOCAMPUS) == {"anterior hippocampus": 1, "posterior hippocampus": 2}
    require_data(few_shot(cases, 3), HIPPOCAMPUS, ["anterior hippocampus"])
