from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_petl.data import DataError, make_phantom_dataset
from monai_petl.demo import demo
from monai_petl.demo.checks import dice_by_class
from monai_petl.demo.run import BUNDLE, METHODS
from monai_petl.demo.settings import settings_for

HIPPOCAMPUS = Path(__file__).parents[2] / "../shared/data/mr_hippocampus"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of which, as in the Decathlon, the test cases have no labels."""
    folder = make_phantom_dataset(tmp_path_factory.mktemp("demo") / "data", 3, 1, 1, 0, (32, 32, 5), (8.0, 8.0, 10.0))
    contents = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    contents["test"] = [case["image"] for case in contents["test"]]
    (folder / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The report of a demo of very few steps."""
    return demo(str(tmp_path_factory.mktemp("made") / "demo"), str(data), labelled=2, effort=0.01)


@pytest.mark.slow
def test_demo_writes_a_report_with_its_pictures(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert len(re.findall(r'<img alt="\w+" src="data:image/png;base64,[A-Za-z0-9+/=]{1000,}"', page)) == 3
    assert {"overlays.png", "dice.png", "curves.png"} <= {path.name for path in report.parent.glob("*.png")}
    assert "kidney" in page
    assert "CHANGED" not in page


@pytest.mark.slow
def test_demo_measures_what_it_claims(report: Path) -> None:
    summary = json.loads((report.parent / "summary.json").read_text(encoding="utf-8"))
    assert summary["base_classes_unchanged"] is True
    assert summary["trained"] == 57_344
    assert summary["body"] == 6_758_304
    assert summary["labelled"] == 2
    assert set(summary["dice"]) == {"liver", "spleen", "kidney", "aorta", "spine"}
    assert all(0 <= dice <= 1 for dice in summary["dice"].values())
    assert summary["bytes"] < 300_000


@pytest.mark.slow
def test_demo_ends_with_a_comparison_of_methods(report: Path) -> None:
    results = json.loads((report.parent / "comparison" / "results.json").read_text(encoding="utf-8"))
    runs = {(run["method"], run["seed"]): run for run in results["runs"]}
    assert runs.keys() == {(method, seed) for method in METHODS for seed in (0, 1)}
    assert {run["status"] for run in runs.values()} == {"done"}
    trained = {method: runs[method, 0]["trained"] for method in METHODS}
    body = 6_758_304
    assert trained == {
        "prompt tuning": 57_344,
        "LoRA": 239_234,
        "head only": 130,
        "full fine-tuning": body + 57_344 + 512,
    }
    assert all(set(run["cases"]) <= {"phantom_003.nii.gz"} for run in runs.values())
    assert (report.parent / "comparison" / "report.html").is_file()
    assert 'href="comparison/report.html"' in report.read_text(encoding="utf-8")


@pytest.mark.slow
def test_commands_of_the_report_name_configs_and_ids_that_exist(report: Path) -> None:
    page = report.read_text(encoding="utf-8").replace("&#x27;", "'").replace("&quot;", '"')
    commands = re.findall(r"<pre>(python -m monai\.bundle run .*?)</pre>", page, re.S)
    assert len(commands) == 3
    for text in commands:
        words = shlex.split(text)
        assert words[:4] == ["python", "-m", "monai.bundle", "run"]
        given = {key.removeprefix("--"): value for key, value in zip(words[4::2], words[5::2], strict=True)}
        config = json.loads(Path(given.pop("config_file")).read_text(encoding="utf-8"))
        assert given.keys() <= config.keys()
        for value in given.values():
            if value.startswith("["):
                assert isinstance(ast.literal_eval(value), list)


@pytest.mark.slow
def test_demo_replaces_a_former_demo_but_not_before_its_data_are_found_good(report: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no folder"):
        demo(str(report.parent), str(tmp_path / "none"))
    assert report.is_file()


def test_demo_refuses_a_folder_that_is_no_demo(tmp_path: Path, data: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(FileExistsError, match="no demo; choose another folder"):
        demo(str(tmp_path), str(data))
    assert (tmp_path / "thesis.tex").is_file()


def test_demo_says_where_it_looked_for_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no bundle at .*nowhere"):
        demo(str(tmp_path), bundle=str(tmp_path / "nowhere"))
    assert (BUNDLE / "configs" / "pretrain.json").is_file()


def test_demo_needs_labelled_cases_to_score_on(tmp_path: Path) -> None:
    folder = make_phantom_dataset(tmp_path / "data", 2, 0, 0, 0, (16, 16, 2))
    with pytest.raises(DataError, match="no labelled test or validation cases"):
        demo(str(tmp_path / "demo"), str(folder))
    assert not (tmp_path / "demo").exists()


def test_settings_fit_the_volumes(data: Path) -> None:
    settings = settings_for(data, labelled=9)
    assert settings.new_class == "kidney"
    assert settings.base_classes == ["liver", "spleen", "aorta", "spine"]
    assert settings.spacing == [8.0, 8.0, 10.0]
    assert settings.patch == (32, 32)
    assert settings.normalisation == "window"
    assert settings.labelled == 3  # no more than there are
    for sizes in settings.views().values():
        assert np.min(np.array(sizes).reshape(-1, 3)[:, :2]) >= 32


def test_settings_follow_the_users_choice_of_classes(data: Path) -> None:
    settings = settings_for(data, "spleen", ["liver", "spleen", "aorta"])
    assert settings.new_class == "spleen"
    assert settings.base_classes == ["liver", "aorta"]
    assert settings_for(data, "spleen", "liver").base_classes == ["liver"]
    with pytest.raises(DataError, match="no class named pancreas"):
        settings_for(data, "pancreas")
    with pytest.raises(DataError, match="no class named pancreas"):
        settings_for(data, None, ["liver", "pancreas"])
    with pytest.raises(ValueError, match="labelled must be at least 1"):
        settings_for(data, labelled=0)


def test_large_volumes_are_made_smaller(tmp_path: Path) -> None:
    folder = make_phantom_dataset(tmp_path / "data", 1, 0, 0, 0, (240, 192, 2), (1.0, 1.0, 4.0))
    settings = settings_for(folder)
    assert settings.patch == (96, 80)
    assert settings.spacing == [2.5, 2.5, 4.0]


def test_settings_need_two_classes_and_nifti(tmp_path: Path) -> None:
    folder = make_phantom_dataset(tmp_path / "data", 1, 0, 0, 0, (16, 16, 2))
    contents = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(
        json.dumps({**contents, "labels": {"0": "background", "1": "liver"}}), encoding="utf-8"
    )
    with pytest.raises(DataError, match="has 1 class; the demo needs at least two"):
        settings_for(folder)
    (folder / "dataset.json").write_text(
        json.dumps({**contents, "training": [{"image": "a.nrrd", "label": "b.nrrd"}], "validation": []}),
        encoding="utf-8",
    )
    with pytest.raises(DataError, match=r"a\.nrrd is no NIfTI file"):
        settings_for(folder)


def test_settings_of_a_real_mr_data_set() -> None:
    if not HIPPOCAMPUS.is_dir():
        pytest.skip("the hippocampus data are not here")
    settings = settings_for(HIPPOCAMPUS)
    assert settings.normalisation == "percentile"
    assert settings.base_classes == ["anterior hippocampus"]
    assert settings.new_class == "posterior hippocampus"
    assert all(extent % 16 == 0 and 32 <= extent <= 96 for extent in settings.patch)


def test_dice_is_that_of_each_class_by_name(tmp_path: Path) -> None:
    label = np.zeros((4, 4, 2), dtype=np.uint8)
    label[:2], label[2:] = 1, 5
    predicted = np.zeros_like(label)  # value k is the k-th of the classes that are asked for
    predicted[2:], predicted[:1] = 1, 2
    for name, voxels in (("label", label), ("image", label), ("image_seg", predicted)):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"1": "liver", "5": "spine"}}), encoding="utf-8")
    case = {"image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / "label.nii.gz")}
    assert dice_by_class(tmp_path, tmp_path, [case], ["spine", "liver"]) == {"spine": 1.0, "liver": 0.6667}
