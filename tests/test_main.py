"""The command line, run in this process: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_petl import adapt, save_adapter
from monai_petl.data import load_datalist, make_phantom_dataset
from monai_petl.methods import PromptTuning
from tests.conftest import Run, error_of, small_punet

BUNDLE = Path(__file__).parents[1] / "bundles" / "punet_ct_segmentation"


def test_summary_prints_a_table_of_a_bundle(run: Run) -> None:
    assert "57,344 of 6,988,192 parameters train: 0.82 %" in run("summary", BUNDLE)


def test_summary_prints_json_of_a_config_and_a_method(run: Run) -> None:
    counted = json.loads(run("summary", BUNDLE / "configs" / "train.json", "--json", "--method", "head"))
    assert set(counted) == {"total", "trainable", "frozen", "fraction"}
    assert counted["trainable"] == 130
    assert counted["trainable"] + counted["frozen"] == counted["total"]


def test_summary_names_an_unknown_id_config_or_method(run: Run) -> None:
    assert "no id 'varient'" in error_of(run, "summary", BUNDLE, "--varient", "full")
    assert "no config at /nowhere" in error_of(run, "summary", "/nowhere")
    assert "method must be one of prompt" in error_of(run, "summary", BUNDLE, "--method", "sorcery")


def test_adapter_inspect_tells_what_a_file_holds(run: Run, tmp_path: Path) -> None:
    network = adapt(small_punet("liver"), PromptTuning("kidney"), name="kidney")
    file = save_adapter(network, tmp_path / "kidney.safetensors", {"volumes": 3})
    text = run("adapter", "inspect", file)
    for part in ("PromptTuning", "classes       kidney", "'volumes': 3", "nothing", "PUNet"):
        assert part in text
    header = json.loads(run("adapter", "inspect", file, "--json"))
    assert header["class_names"] == ["kidney"]
    assert header["fingerprint"]


def test_adapter_inspect_names_a_file_that_is_no_adapter(run: Run, tmp_path: Path) -> None:
    assert "no adapter file" in error_of(run, "adapter", "inspect", tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no adapter", encoding="utf-8")
    assert "is not an adapter file" in error_of(run, "adapter", "inspect", tmp_path / "text")


def test_data_make_builds_a_data_set_that_data_check_accepts(run: Run, tmp_path: Path) -> None:
    source = make_phantom_dataset(tmp_path / "source", 3, 0, 0, 0, (16, 16, 3))
    out = tmp_path / "made"
    names = "liver,spleen,kidney,aorta,spine"
    run("data", "make", source / "imagesTr", source / "labelsTr", out, "--class_names", names)
    assert len(load_datalist(out)) + len(load_datalist(out, "validation")) + len(load_datalist(out, "test")) == 3
    assert "no problems found" in run("data", "check", source)
    assert json.loads(run("data", "check", source, "--json"))["ok"] is True


def test_data_check_ends_with_1_on_problems_after_printing_them(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_phantom_dataset(tmp_path / "data", 2, 0, 0, 0, (16, 16, 3))
    image = next((folder / "imagesTr").iterdir())
    nib.save(nib.Nifti1Image(np.zeros((16, 16, 3), np.int16), nib.load(image).affine), image)
    with pytest.raises(SystemExit) as stop:
        run("data", "check", folder)
    assert stop.value.code == 1
    assert f"{image.name} is constant" in capsys.readouterr().out


def test_data_errors_are_one_sentence(run: Run, tmp_path: Path) -> None:
    assert "there is no folder /nowhere" in error_of(run, "data", "check", "/nowhere")
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    arguments = (tmp_path / "images", tmp_path / "labels", tmp_path / "out")
    assert "holds no volumes" in error_of(run, "data", "make", *arguments)
    assert not (tmp_path / "out").exists()


def test_demo_errors_are_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    data = make_phantom_dataset(tmp_path / "data", 2, 1, 0, 0, (16, 16, 2))
    assert "the data lies inside" in error_of(run, "demo", "--out", tmp_path, "--data", data)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine", encoding="utf-8")
    assert "holds something that is no demo" in error_of(run, "demo", "--out", tmp_path / "full", "--data", data)
    assert "names no folder" in error_of(run, "demo", "--out", tmp_path / "demo", "--data", tmp_path / "none")


def test_error_inside_a_bundle_run_is_one_sentence(run: Run, tmp_path: Path) -> None:
    data = make_phantom_dataset(tmp_path / "data", 2, 1, 0, 0, (16, 16, 2))
    image = load_datalist(data, "validation")[0]["label"]
    Path(image).unlink()
    assert f"{Path(image).name} is missing" in error_of(run, "demo", "--out", tmp_path / "demo", "--data", data)


def test_unknown_verb_ends_with_an_error_code(run: Run) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fly")
    assert stop.value.code not in (0, None)
