"""A real comparison of a real bundle, from the command line, on phantoms."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fire.parser import DefaultParseValue
from ignite.engine import Engine

from monai_petl.compare.pictures import PictureTaker
from monai_petl.compare.worker import _Answers, _names, run_job
from monai_petl.core.adapters import inspect_adapter
from monai_petl.data import make_phantom_dataset
from tests.bundles.helpers import AIM, INFLATED, REPOSITORY, SIZE, SPACING

LENGTH = {"epochs": 2, "epoch_length": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom_dataset(tmp_path_factory.mktemp("phantoms") / "data", 3, 1, 2, 0, SIZE, SPACING)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict:
    work = tmp_path_factory.mktemp("work")
    ids = {
        **INFLATED.settings["train"],
        **LENGTH,
        "method": "lora",
        "dataset_dir": str(data),
        "pretrained_path": None,
        "seed": 0,
    }
    ids |= {"num_labelled": 2, "class_names": ["liver", "spleen"], "cache_rate": 0.0}
    pictures = {"pictures": 2, "picture_file": str(work / "pictures.npz")}
    return {
        "bundle": str(INFLATED.path),
        "ids": ids,
        "factor": 0.5,
        "section": "test",
        "device": "cpu",
        "work": str(work),
        **pictures,
    }


def test_a_run_measures_what_it_says(job: dict) -> None:
    record = run_job(job)
    assert record["metric"] == "val_mean_dice"
    assert 0 <= record["quality"] <= 1
    assert record["quality"] == pytest.approx(np.mean(list(record["cases"].values())), abs=1e-5)
    assert all(name.endswith(".nii.gz") for name in record["cases"])
    assert (record["steps"], len(record["curve"])) == (6, 2)
    assert record["rates"] == pytest.approx({"lr": 0.00025, "delta_lr": 0.0005, "backbone_lr": 0.000015})
    adapter = Path(job["work"]) / "models" / "adapters" / "lora.safetensors"
    assert record["file_bytes"] == adapter.stat().st_size
    assert inspect_adapter(adapter)["values"] == record["trained"]
    assert record["peak_bytes"] > record["saved_bytes"] > 0
    assert record["flops"] > 0
    assert record["step_seconds"] > 0
    words = shlex.split(record["command"])
    said = {
        name.removeprefix("--"): DefaultParseValue(value) for name, value in zip(words[4::2], words[5::2], strict=True)
    }
    assert {name: said[name] for name in job["ids"]} == {**job["ids"], "val_interval": 3}  # not before the end
    with np.load(job["picture_file"]) as pictures:
        assert set(pictures) == {"names", *(f"{name}_{i}" for name in ("image", "label", "pred") for i in range(2))}
        assert list(pictures["names"]) == list(record["cases"])
        assert pictures["label_0"].shape == pictures["pred_0"].shape == pictures["image_0"].shape[:2]
        assert pictures["label_0"].max() <= 2
        assert pictures["image_0"].max() == 255


def test_a_section_without_cases_is_refused_before_training(job: dict, tmp_path: Path) -> None:
    empty = make_phantom_dataset(tmp_path / "data", 2, 0, 0, 0, SIZE, SPACING)
    with pytest.raises(ValueError, match="the section 'test' of the data holds no case to score"):
        run_job({**job, "ids": {**job["ids"], "dataset_dir": str(empty)}, "work": str(tmp_path / "work")})
    assert not list((tmp_path / "work").rglob("*.pt"))


@pytest.mark.parametrize(("count", "kept"), [(0, []), (1, [5]), (3, [1, 5, 8]), (20, list(range(10)))])
def test_pictured_cases_are_spread_over_all(count: int, kept: list[int], tmp_path: Path) -> None:
    names = [f"case{i}" for i in range(10)]
    evaluator = Engine(lambda engine, batch: [{"image": torch.rand(1, 4, 4), "label": i, "pred": i} for i in batch])
    taker = PictureTaker(evaluator, names, count)
    evaluator.run([range(4), range(4, 8), range(8, 10)])
    taker.save(tmp_path / "pictures.npz")
    with np.load(tmp_path / "pictures.npz") as pictures:
        assert list(pictures["names"]) == [f"case{i}" for i in kept]
        assert [int(pictures[f"label_{i}"][0]) for i in range(len(kept))] == kept


def test_pictures_are_drawn_as_they_are_read_and_slices_as_radiologists_look_at_them(tmp_path: Path) -> None:
    top = torch.zeros(1, 40, 48)  # rows, columns
    top[:, :20] = 1
    anterior = torch.zeros(1, 40, 48, 5)  # from left to right, from back to front, from feet to head
    anterior[:, :, 24:] = 1
    maps = {"label": (anterior > 0).long(), "pred": (anterior > 0).long()}
    cases = [{"image": top, "label": 1, "pred": 1}, {"image": top, "label": top.long(), "pred": top.long()}]
    cases.append({"image": anterior, **maps})
    evaluator = Engine(lambda engine, batch: [cases[i] for i in batch])
    taker = PictureTaker(evaluator, ["a", "b", "c"], 3)
    evaluator.run([range(3)])
    taker.save(tmp_path / "pictures.npz")
    with np.load(tmp_path / "pictures.npz") as pictures:
        shapes = [pictures[f"image_{i}"].shape[:2] for i in range(3)]
        assert shapes == [(40, 48), (40, 48), (48, 40)]
        for i in range(3):
            half = shapes[i][0] // 2
            assert (pictures[f"image_{i}"][:half] == 255).all()
            assert (pictures[f"image_{i}"][half:] == 0).all()
        assert (pictures["label_1"][:20] == 1).all()


def test_images_of_the_same_name_are_different_cases() -> None:
    assert _names([{"image": "/d/p0/image.nii.gz"}, {"image": "/d/p1/image.nii.gz"}]) == [
        "p0/image.nii.gz",
        "p1/image.nii.gz",
    ]
    assert _names([{"image": "/d/a.png"}]) == ["a.png"]
    assert _names([{"image": "/d/a.png"}, {"image": "/d/a.png"}]) == ["0", "1"]
    assert _names([{"x": 1}, {"x": 2}]) == ["0", "1"]


def test_scores_of_images_have_the_balanced_accuracy_as_their_mean() -> None:
    engine = Engine(lambda engine, batch: None)
    answers = _Answers(engine)
    pairs = [(0, [0.9, 0.1]), (0, [0.2, 0.8]), (0, [0.6, 0.4]), (1, [0.3, 0.7])]
    engine.state.output = [{"label": label, "pred": torch.tensor(pred)} for label, pred in pairs]
    answers._collect(engine)
    assert np.mean(list(answers.cases("abcd").values())) == pytest.approx((2 / 3 + 1) / 2)
    assert answers.cases("abc") == {}


@pytest.mark.slow
def test_the_command(tmp_path: Path, data: Path) -> None:
    ids = {**INFLATED.settings["train"], **LENGTH, "dataset_dir": data, "pretrained_path": None}
    del ids["val_interval"]
    sizes = {"token_size": [8, 8], "patch_size": [32, 32, 4], "slab_size": [32, 32, 4]}
    arms = {"head": {}, "sorcery": {"method": "sorcery"}, "slices": {"bundle": str(AIM.path), "method": "aim", **sizes}}
    (tmp_path / "arms.json").write_text(json.dumps(arms), encoding="utf-8")
    options = {
        "methods": tmp_path / "arms.json",
        "seeds": 1,
        "shots": "2",
        "out": tmp_path / "out",
        "pictures": 1,
        **ids,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai_petl", "compare", str(INFLATED.path), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8")
    assert done.returncode == 1, done.stderr[-3000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "error: 1 of 3 runs failed, first sorcery with seed 0: ValueError: method must be one of lora"
    )
    assert f"The others are in {tmp_path / 'out' / 'report.html'}" in last
    assert "head, 2 labelled, seed 0: 0." in done.stderr
    assert "sorcery, 2 labelled, seed 0: ValueError: method must be one of lora" in done.stderr
    assert {path.name for path in (tmp_path / "out").glob("[!.]*.*")} == {
        "plan.json",
        "report.html",
        "results.csv",
        "results.json",
    }
    stored = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [run["status"] for run in stored["runs"]] == ["done", "failed", "done"]
    assert stored["runs"][2]["cases"].keys() == stored["runs"][0]["cases"].keys()
    assert f"--bundle_root {AIM.path}" in stored["runs"][2]["command"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "compare" in page
    assert page.count('src="data:image/png') == 4


@pytest.mark.slow
def test_a_comparison_of_which_every_run_fails_ends_with_the_reason_and_no_report(tmp_path: Path) -> None:
    arguments = ["--methods", "head", "--seeds", "1", "--out", str(tmp_path / "out"), "--dataset_dir", "/nowhere"]
    command = [sys.executable, "-m", "monai_petl", "compare", str(INFLATED.path), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: all 1 runs failed: head with seed 0: ")
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--methods", "lora"], "no bundle at nowhere"),
        ([str(INFLATED.path), "--methods", "lora", "--shots", "many"], "--shots takes positive whole numbers"),
        ([str(INFLATED.path), "--methods", "lora", "--budget", "long"], "--budget takes a time"),
        ([str(INFLATED.path), "--methods", "lora", "--devices", "cuda:99"], "no cuda:99 here"),
        ([str(INFLATED.path), "--methods", "lora", "--epoch", "4"], "has no id 'epoch'; did you mean epochs"),
        ([str(INFLATED.path), "--methods", "other.json"], "aim_vit_segmentation has no id 'center_slice'"),
        ([str(INFLATED.path), "--methods", "nowhere.json"], "no bundle at nowhere"),
        ([str(INFLATED.path), "--methods", "lora", "--seed", "4"], "seed: the comparison sets this itself"),
        ([str(INFLATED.path), "--methods", "lora", "--seeds", "0"], "one seed; got 1, 1 and 0"),
    ],
)
def test_a_wrong_argument_is_one_sentence(tmp_path: Path, monkeypatch, capsys, arguments, message) -> None:
    from monai_petl.__main__ import main

    monkeypatch.chdir(tmp_path)
    for name, bundle in (("other", str(AIM.path)), ("nowhere", "nowhere")):
        arms = {"slices": {"bundle": bundle, "center_slice": False}}
        Path(f"{name}.json").write_text(json.dumps(arms), encoding="utf-8")
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["monai_petl", "compare", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert message in str(ended.value)
    assert set(tmp_path.iterdir()) == before
