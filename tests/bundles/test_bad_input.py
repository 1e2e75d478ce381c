"""Input that cannot be used: one sentence that names the file or the setting, an error, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.bundles.helpers import (
    PUNET,
    SEGMENTERS,
    Bundle,
    Trained,
    command,
    files_below,
    messages,
    named,
    parsed,
    refusal,
    run,
    segmentations,
)

RUNS = [(bundle, config) for bundle in SEGMENTERS for config in bundle.settings]


@pytest.fixture(params=SEGMENTERS, ids=named)
def each(request: pytest.FixtureRequest) -> Bundle:
    """Every bundle for segmentation in turn."""
    return request.param


@pytest.fixture
def broken(tmp_path: Path, data: Path) -> Path:
    """A copy of the data set, to be broken."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    volume = nib.load(path)
    voxels = change(np.asarray(volume.dataobj))
    nib.save(nib.Nifti1Image(voxels, volume.affine if affine is None else affine), path)


def start_of(name: str, weights: dict[str, str]) -> dict[str, str]:
    """What a training starts from, as overrides; pre-training starts from nothing."""
    return {} if name == "pretrain" else {"pretrained_path": weights["pretrained_path"]}


def classes_of(bundle: Bundle) -> dict[str, Any]:
    """What inference is asked for: PUNet's network after training holds other classes than the default ones."""
    return {"class_names": ["kidney"]} if bundle == PUNET else {}


def make_case_bad(folder: Path, kind: str) -> str:
    """Break one training case; returns what the message has to say."""
    image, label = sorted((folder / "imagesTr").iterdir())[1], sorted((folder / "labelsTr").iterdir())[1]
    if kind == "shape":
        rewrite(label, lambda voxels: voxels[:-1])
        return rf"{label.name} does not lie on its image's grid: shape"
    if kind == "affine":
        rewrite(label, lambda voxels: voxels, np.diag([8.0, 8.0, 9.0, 1.0]))
        return rf"{label.name} does not lie on its image's grid: corners"
    if kind == "nan":
        rewrite(image, lambda voxels: np.where(voxels > 0, np.nan, voxels).astype(np.float32))
        return rf"{image.name} holds NaN"
    if kind == "constant":
        rewrite(image, lambda voxels: np.full_like(voxels, 7))
        return rf"{image.name} is constant"
    if kind == "corrupt":
        image.write_bytes(b"not an image")
        return rf"{image.name} cannot be read"
    if kind == "missing":
        image.unlink()
        return rf"{image.name} is missing"
    rewrite(image, lambda voxels: np.stack([voxels, voxels], -1))
    return rf"{image.name} has 4 axes"


# Data


@pytest.mark.parametrize(("each", "name"), RUNS, ids=named, indirect=["each"])
def test_missing_or_empty_data_folder_is_named(
    each: Bundle, name: str, tmp_path: Path, weights: dict[str, str]
) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    refusal(each, name, tmp_path, missing, rf"dataset_dir names no folder: {missing}", **weights)
    empty.mkdir()
    refusal(each, name, tmp_path, empty, rf"no cases were found in dataset_dir {empty}", **weights)


@pytest.mark.parametrize("kind", ["shape", "affine", "nan", "constant", "corrupt", "missing", "axes"])
def test_bad_training_case_is_named(
    each: Bundle, kind: str, tmp_path: Path, broken: Path, weights: dict[str, str]
) -> None:
    pattern = make_case_bad(broken, kind)
    for name in each.settings.keys() - {"evaluate", "inference"}:
        refusal(each, name, tmp_path / name, broken, pattern, **start_of(name, weights))


def test_bad_validation_case_is_named_before_training(
    each: Bundle, tmp_path: Path, broken: Path, weights: dict[str, str]
) -> None:
    cases = json.loads((broken / "dataset.json").read_text(encoding="utf-8"))["validation"]
    (broken / cases[0]["label"]).unlink()
    pattern = rf"{Path(cases[0]['label']).name} is missing"
    for name in each.settings.keys() - {"evaluate", "inference"}:
        refusal(each, name, tmp_path / "run", broken, pattern, **start_of(name, weights))


def test_training_case_without_a_label_is_named(
    each: Bundle, tmp_path: Path, broken: Path, weights: dict[str, str]
) -> None:
    contents = json.loads((broken / "dataset.json").read_text(encoding="utf-8"))
    del contents["training"][0]["label"]
    (broken / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
    pattern = rf"{Path(contents['training'][0]['image']).name} has no label"
    for name in each.settings.keys() - {"evaluate", "inference"}:
        refusal(each, name, tmp_path / "run", broken, pattern, **start_of(name, weights))


def test_class_that_no_label_holds_is_named(
    each: Bundle, tmp_path: Path, broken: Path, weights: dict[str, str]
) -> None:
    for label in (broken / "labelsTr").iterdir():
        rewrite(label, lambda voxels: np.where(voxels == 3, 0, voxels).astype(np.uint8))
    sentence = r"none of the \d labels holds the label value 3 \(kidney\)"
    refusal(each, "train", tmp_path / "run", broken, sentence, **start_of("train", weights))
    if "pretrain" in each.settings:
        refusal(each, "pretrain", tmp_path / "run", broken, sentence, base_classes=["liver", "kidney"])


def test_unlabelled_case_cannot_be_evaluated(
    each: Bundle, tmp_path: Path, broken: Path, weights: dict[str, str]
) -> None:
    contents = json.loads((broken / "dataset.json").read_text(encoding="utf-8"))
    contents["test"] = [case["image"] for case in contents["test"]]
    (broken / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
    refusal(each, "evaluate", tmp_path / "run", broken, "has no label", eval_section="test", **weights)


def test_damaged_dataset_json_is_named(each: Bundle, tmp_path: Path, broken: Path, weights: dict[str, str]) -> None:
    (broken / "dataset.json").write_text('{"training": [', encoding="utf-8")
    sentence = r"dataset\.json cannot be read as JSON"
    refusal(each, "train", tmp_path / "run", broken, sentence, **start_of("train", weights))


@pytest.mark.parametrize("kind", ["nan", "constant", "corrupt"])
def test_bad_image_for_inference_is_named(
    each: Bundle, kind: str, tmp_path: Path, broken: Path, weights: dict[str, str]
) -> None:
    pattern = make_case_bad(broken, kind)
    bad = sorted((broken / "imagesTr").iterdir())[1]
    overrides = {**classes_of(each), **weights}
    refusal(each, "inference", tmp_path / "run", broken, pattern, images=str(bad), **overrides)
    if kind == "corrupt":  # headers are read before the first case is segmented
        images = str(broken / "imagesTr/*.nii.gz")
        refusal(each, "inference", tmp_path / "run", broken, pattern, images=images, **overrides)


def test_pattern_that_matches_no_image_is_named(
    each: Bundle, tmp_path: Path, data: Path, weights: dict[str, str]
) -> None:
    overrides = {"images": str(data / "*.dcm"), **classes_of(each), **weights}
    refusal(each, "inference", tmp_path, data, "no file matches images=.*dcm", **overrides)


def test_patch_larger_than_the_volume_is_padded(tmp_path: Path, data: Path) -> None:
    large: dict[str, Any] = {"patch_size": [64, 48, 1], "slab_size": [64, 48, 1], "teacher_size": [64, 64, 1]}
    flow = run("pretrain", tmp_path, data, epochs=1, student_sizes=[[64, 48, 1]], **large)
    assert parsed(flow, "train::trainer").state.epoch == 1
    del large["teacher_size"]
    run("train", tmp_path, data, epochs=1, **large)
    run("inference", tmp_path, data, class_names=["kidney"], patch_size=[64, 48, 1])
    for image in (data / "imagesTs").iterdir():
        name = image.name.replace(".nii.gz", "_seg.nii.gz")
        assert segmentations(tmp_path / "eval")[name].shape == nib.load(image).shape


# Settings


def test_unknown_class_is_named_with_those_that_exist(tmp_path: Path, data: Path, tuned: Trained) -> None:
    weights = {"pretrained_path": str(tuned.model), "ckpt_path": str(tuned.model)}
    known = "liver, spleen, kidney, aorta, spine"
    sentence = f"has no class named pancreas; its classes are {known}"
    refusal(PUNET, "train", tmp_path, data, sentence, new_class="pancreas", **weights)
    refusal(PUNET, "pretrain", tmp_path, data, sentence, base_classes=["liver", "pancreas"])
    refusal(PUNET, "evaluate", tmp_path, data, sentence, eval_classes=["pancreas"], **weights)
    refusal(PUNET, "train", tmp_path, data, "holds no prompts of spine", base_classes=["liver", "spine"], **weights)
    sentence = r"class 'pancreas' has no weights: .*holds liver.*and there is no adapter file pancreas\.safetensors"
    refusal(PUNET, "inference", tmp_path, data, sentence, class_names=["liver", "pancreas"], **weights)


def test_new_class_among_the_base_classes_is_named(tmp_path: Path, data: Path, pretrained: Trained) -> None:
    weights = {"pretrained_path": str(pretrained.model)}
    refusal(PUNET, "train", tmp_path, data, "class 'liver' is there already", new_class="liver", **weights)


def test_unknown_method_is_named_with_those_that_exist(tmp_path: Path, data: Path, pretrained: Trained) -> None:
    weights = {"pretrained_path": str(pretrained.model)}
    refusal(
        PUNET, "train", tmp_path, data, "method must be one of prompt, .*; got 'sorcery'", method="sorcery", **weights
    )


def test_more_labelled_volumes_than_there_are(
    each: Bundle, tmp_path: Path, data: Path, weights: dict[str, str]
) -> None:
    sentence = "9 cases were asked for, but the data list holds 4; .*num_labelled"
    refusal(each, "train", tmp_path, data, sentence, num_labelled=9, **start_of("train", weights))
    refusal(each, "train", tmp_path, data, "must be positive", num_labelled=0, **start_of("train", weights))


# Weights


def test_missing_or_damaged_model_is_named(tmp_path: Path, data: Path, pretrained: Trained) -> None:
    missing, short, other = tmp_path / "none.pt", tmp_path / "short.pt", tmp_path / "other.pt"
    short.write_bytes(pretrained.model.read_bytes()[:5000])
    torch.save({"weight": torch.zeros(2)}, other)
    for name, key, classes in (
        ("train", "pretrained_path", {}),
        ("evaluate", "ckpt_path", {}),
        ("inference", "ckpt_path", {"class_names": ["liver"]}),
    ):
        refusal(PUNET, name, tmp_path, data, rf"no pre-trained network at {missing}", **{key: str(missing)}, **classes)
        refusal(PUNET, name, tmp_path, data, rf"{short} cannot be read", **{key: str(short)}, **classes)
        refusal(PUNET, name, tmp_path, data, rf"{other} does not fit this PUNet", **{key: str(other)}, **classes)
    refusal(
        PUNET,
        "inference",
        tmp_path,
        data,
        rf"no pre-trained network at {tmp_path}/models/model.pt",
        class_names=["liver"],
    )


def test_model_of_other_network_settings_is_named(tmp_path: Path, data: Path, pretrained: Trained) -> None:
    overrides = {"class_names": ["liver"], "ckpt_path": str(pretrained.model), "channels": [8, 8, 16, 16, 32]}
    refusal(PUNET, "inference", tmp_path, data, "Use the network settings that the file was trained with", **overrides)


def test_wrong_or_damaged_adapter_is_named(tmp_path: Path, data: Path, pretrained: Trained, tuned: Trained) -> None:
    good = tuned.bundle / "models" / "adapters" / "kidney.safetensors"
    short = tmp_path / "short.safetensors"
    short.write_bytes(good.read_bytes()[:2000])
    weights = {"ckpt_path": str(pretrained.model), "class_names": ["kidney"], "adapter_dir": str(tmp_path)}

    def refuse(pattern: str, file: Path, **overrides: Any) -> None:
        adapters = {"adapters": {"kidney": str(file)}}
        refusal(PUNET, "inference", tmp_path, data, pattern, **{**weights, **adapters, **overrides})

    refuse(r"short\.safetensors is not an adapter file, or is damaged", short)
    refuse("no adapter file .*none", tmp_path / "none.safetensors")
    adapters = {"aorta": str(good)}
    refuse("is not an adapter of the class 'aorta'", good, class_names=["aorta"], adapters=adapters)
    refuse("adapters names the class 'aorta', which is not among the classes", good, adapters=adapters)
    other = run("pretrain", tmp_path, data, epochs=1, epoch_length=1)
    refuse("was trained on another backbone", good, ckpt_path=str(parsed(other, "ckpt_path")))


def test_adapter_that_changed_the_body_is_not_mixed_with_other_classes(
    tmp_path: Path, data: Path, pretrained: Trained
) -> None:
    run("train", tmp_path, data, pretrained_path=str(pretrained.model), method="decoder", epochs=1, epoch_length=1)
    overrides = {"ckpt_path": str(pretrained.model), "adapter_dir": str(tmp_path / "models" / "adapters")}
    sentence = "can segment 'kidney' only"
    refusal(PUNET, "inference", tmp_path / "run", data, sentence, class_names=["liver", "kidney"], **overrides)
    run("inference", tmp_path / "run", data, class_names=["kidney"], **overrides)


def test_missing_checkpoint_to_resume_from_is_named(
    each: Bundle, tmp_path: Path, data: Path, weights: dict[str, str]
) -> None:
    missing = tmp_path / "none.pt"
    sentence = rf"resume_path names no checkpoint: {missing}"
    for name in each.settings.keys() - {"evaluate", "inference"}:
        refusal(each, name, tmp_path, data, sentence, resume_path=str(missing), **start_of(name, weights))


# Output


@pytest.mark.parametrize("key", ["output_dir", "ckpt_dir", "adapter_dir"])
def test_output_that_cannot_be_written_is_named_before_training(
    each: Bundle, key: str, tmp_path: Path, data: Path, weights: dict[str, str]
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way", encoding="utf-8")
    paths = {name: str(tmp_path / name) for name in ("output_dir", "ckpt_dir", "adapter_dir")}
    paths[key] = str(file / "folder")
    with pytest.raises(Exception) as error:  # noqa: PT011
        each.run("train", tmp_path, data, **start_of("train", weights), **paths)
    assert any(str(file) in text for text in messages(error.value))
    assert not [path for path in files_below(tmp_path) if path.suffix in (".pt", ".safetensors")]


def test_inference_names_an_output_folder_that_cannot_be_written(
    each: Bundle, tmp_path: Path, data: Path, weights: dict[str, str]
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way", encoding="utf-8")
    overrides = {**classes_of(each), **weights, "output_dir": str(file / "out")}
    refusal(each, "inference", tmp_path, data, str(file), **overrides)


@pytest.mark.slow
def test_command_line_ends_with_an_error_code_and_the_sentence(each: Bundle, tmp_path: Path) -> None:
    settings = {**each.settings["train"], "bundle_root": tmp_path, "dataset_dir": tmp_path / "none"}
    arguments = command("-m", "monai.bundle", "run", config_file=each.path / "configs" / "train.json", **settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert f"dataset_dir names no folder: {tmp_path / 'none'}" in done.stderr
    assert not files_below(tmp_path)
