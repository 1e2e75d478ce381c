"""The bundle at work on phantoms: pre-training, every method, evaluation, inference, resuming, several processes."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from monai_petl import inspect_adapter
from monai_petl.methods import PUNET_METHODS
from tests.bundles.helpers import (
    PUNET,
    Trained,
    command,
    config_files,
    copy_bundle,
    files_below,
    messages,
    parsed,
    run,
    segmentations,
    state_in,
    workflow,
)


def last_loss(trained: Any) -> float:
    """The loss of the last training step."""
    output = parsed(trained, "train::trainer").state.output
    return torch.as_tensor((output[0] if isinstance(output, list) else output)["loss"]).item()


def learnt(data: Path, trained: Trained, tmp_path: Path, **overrides: Any) -> Any:
    """Train on the weights of another run, writing to ``tmp_path``."""
    return run("train", tmp_path, data, pretrained_path=str(trained.model), **overrides)


# Pre-training


@pytest.mark.parametrize("mode", ["self", "segmentation", "both"])
def test_pretraining_in_every_mode_gives_a_model_of_the_base_classes(mode: str, tmp_path: Path, data: Path) -> None:
    flow = run("pretrain", copy_bundle(tmp_path), data, mode=mode, epochs=1)
    assert math.isfinite(last_loss(flow))
    terms = {name for name in ("segmentation_loss", "cpa_loss") if name in parsed(flow, "train::trainer").state.output}
    wanted = {"self": {"cpa_loss"}, "segmentation": {"segmentation_loss"}}
    assert terms == wanted.get(mode, {"cpa_loss", "segmentation_loss"})
    state = state_in(Path(parsed(flow, "ckpt_path")))
    assert any(name.startswith("prompts.classes.spleen.") for name in state)


def test_pretraining_without_validation_cases_keeps_the_last_state(tmp_path: Path, data: Path) -> None:
    flow = run("pretrain", tmp_path, data, epochs=1, **{"validate::datalist": []})
    state, network = state_in(tmp_path / "models" / "model.pt"), parsed(flow, "network_def").state_dict()
    assert all(torch.equal(tensor, network[name]) for name, tensor in state.items())


@pytest.mark.slow
def test_default_network_trains_through_the_bundle(tmp_path: Path, data: Path) -> None:
    default = {"channels": [32, 64, 128, 256, 384], "tokens_per_class": 16, "epochs": 1, "epoch_length": 1}
    run("pretrain", tmp_path, data, batch_size=1, student_sizes=[[32, 32, 1]], **default)
    flow = run("train", tmp_path, data, **default)
    trained = [p for p in parsed(flow, "adapted_network").parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 57_344
    assert inspect_adapter(tmp_path / "models/adapters/kidney.safetensors")["bytes"] < 300_000


# Learning a class


@pytest.mark.parametrize("method", PUNET_METHODS)
def test_every_method_trains_and_evaluates_to_what_validation_found(
    method: str, tmp_path: Path, data: Path, pretrained: Trained
) -> None:
    flow = learnt(data, pretrained, tmp_path, method=method, lr=0.02)
    assert math.isfinite(last_loss(flow))
    best = parsed(flow, "validate::evaluator").state.best_metric
    model = tmp_path / "models" / "model.pt"
    assert model.exists() == (method == "prompt")  # the others do not fit network_def; they live in their adapter file
    ckpt_path = model if model.exists() else pretrained.model
    evaluation = run("evaluate", tmp_path, data, ckpt_path=str(ckpt_path))
    found = parsed(evaluation, "validate::evaluator").state.metrics["val_mean_dice"]
    assert found == pytest.approx(best, abs=1e-4)
    assert (tmp_path / "eval" / "metrics.csv").is_file()


def test_prompt_tuning_leaves_every_frozen_tensor_as_it_was(pretrained: Trained, tuned: Trained) -> None:
    before, after = state_in(pretrained.model), state_in(tuned.model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    added = after.keys() - before.keys()
    assert added
    assert all(name.startswith("prompts.classes.kidney.") for name in added)


def test_adapter_file_notes_how_it_was_trained(tmp_path: Path, data: Path, pretrained: Trained) -> None:
    learnt(data, pretrained, tmp_path, num_labelled=1, epochs=1)
    notes = inspect_adapter(tmp_path / "models/adapters/kidney.safetensors")["notes"]
    assert notes["labelled_volumes"] == 1
    assert notes["method"] == "prompt"
    assert "val_mean_dice" in notes


def test_training_goes_on_where_it_stopped(tmp_path: Path, data: Path, pretrained: Trained) -> None:
    settings = {"pretrained_path": str(pretrained.model), "epochs": 3}
    flow = workflow("train", tmp_path, data, **settings)
    flow.initialize()

    def power_cut() -> None:
        raise RuntimeError("power cut")

    parsed(flow, "train::trainer").add_event_handler(Events.EPOCH_STARTED(once=3), power_cut)
    with pytest.raises(RuntimeError) as error:
        flow.run()
    assert "power cut" in messages(error.value)
    [checkpoint] = (tmp_path / "eval" / "checkpoints").glob("*.pt")
    assert "epoch=2" in checkpoint.name
    flow = workflow("train", tmp_path, data, **settings, resume_path=str(checkpoint))
    flow.initialize()
    epochs: list[int] = []
    trainer = parsed(flow, "train::trainer")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: epochs.append(engine.state.epoch))
    flow.run()
    assert epochs == [3]
    assert parsed(flow, "lr_scheduler").last_epoch == 3 * PUNET.settings["train"]["epoch_length"]


def test_the_losses_are_chosen_by_name(tmp_path: Path, data: Path) -> None:
    run("pretrain", tmp_path, data, epochs=1, segmentation_loss="focal")
    with pytest.raises(RuntimeError) as error:
        run("pretrain", tmp_path, data, epochs=1, segmentation_loss="dice")
    assert any("segmentation_loss must be one of dice_ce, focal; got 'dice'" in text for text in messages(error.value))


def test_resumed_training_keeps_what_was_better_before_the_pause(
    tmp_path: Path, data: Path, pretrained: Trained
) -> None:
    settings = {
        "epochs": 2,
        "val_interval": 1,
        "lr": 0.0,
        "ckpt_dir": str(tmp_path / "models"),
    }  # validations are alike
    settings["pretrained_path"] = str(pretrained.model)
    flow = workflow("train", tmp_path, data, **settings)
    flow.initialize()
    evaluator = parsed(flow, "validate::evaluator")
    evaluator.add_event_handler(Events.COMPLETED, lambda engine: parsed(flow, "train::trainer").terminate())
    flow.run()
    [checkpoint] = (tmp_path / "eval" / "checkpoints").glob("*.pt")
    best = [tmp_path / "models" / "model.pt", tmp_path / "models" / "adapters" / "kidney.safetensors"]
    written = [file.stat().st_mtime_ns for file in best]
    flow = run("train", tmp_path, data, **settings, resume_path=str(checkpoint))
    assert parsed(flow, "validate::evaluator").state.epoch == 2
    assert [file.stat().st_mtime_ns for file in best] == written
    best[1].unlink()
    run("train", tmp_path, data, **settings, resume_path=str(checkpoint))
    assert best[1].is_file()
    assert best[0].stat().st_mtime_ns > written[0]


def test_schedule_cannot_change_its_length_midway(tmp_path: Path, data: Path, pretrained: Trained) -> None:
    learnt(data, pretrained, tmp_path, epochs=1)
    [checkpoint] = (tmp_path / "eval" / "checkpoints").glob("*.pt")
    with pytest.raises(RuntimeError) as error:
        learnt(data, pretrained, tmp_path, epochs=3, resume_path=str(checkpoint))
    assert any("is of a training of 2 steps, this one is of 6" in text for text in messages(error.value))


def test_learning_rates_are_those_of_the_schedule(tmp_path: Path, data: Path) -> None:
    settings = {"epochs": 1, "body_lr": 0.002, "prompt_lr": 0.01}

    def rates(flow: ConfigWorkflow) -> list[float]:
        return [group["lr"] for group in parsed(flow, "optimizer").param_groups]

    assert rates(run("pretrain", tmp_path / "a", data, lr_schedule="constant", **settings)) == [0.002, 0.01]
    assert rates(run("pretrain", tmp_path / "b", data, lr_schedule="one_cycle", **settings)) != [0.002, 0.01]
    with pytest.raises(RuntimeError) as error:
        run("pretrain", tmp_path / "c", data, lr_schedule="cosine", **settings)
    assert any("cosine" in text for text in messages(error.value))


def test_classes_are_taught_one_after_the_other_on_the_same_model(
    tmp_path: Path, data: Path, pretrained: Trained
) -> None:
    (tmp_path / "models").mkdir()
    shutil.copy(pretrained.model, tmp_path / "models" / "model.pt")
    run("train", tmp_path, data, epochs=1)
    first = state_in(tmp_path / "models" / "model.pt")
    run("train", tmp_path, data, epochs=1, new_class="aorta", base_classes=["liver", "spleen", "kidney"])
    state = state_in(tmp_path / "models" / "model.pt")
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.items())
    run(
        "train", tmp_path, data, epochs=1, base_classes=["liver", "spleen", "aorta"], prompt_init="copy:liver"
    )  # kidney again
    assert state_in(tmp_path / "models" / "model.pt").keys() == state.keys()
    run("inference", tmp_path, data, class_names=["aorta", "kidney", "liver", "spleen"])


def test_pretraining_goes_on_with_its_teacher(tmp_path: Path, data: Path) -> None:
    run("pretrain", tmp_path, data, epochs=1)
    [checkpoint] = (tmp_path / "eval" / "checkpoints").glob("*.pt")
    saved = state_in(checkpoint)
    flow = run("pretrain", tmp_path, data, epochs=1, resume_path=str(checkpoint))  # nothing is left to do
    teacher = parsed(flow, "teacher").state_dict()
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in saved["teacher"].items())


# Inference


def test_inference_writes_one_label_map_a_case_on_the_grid_of_the_image(
    tmp_path: Path, data: Path, tuned: Trained
) -> None:
    classes = ["liver", "spleen", "kidney"]
    run("inference", tuned.bundle, data, class_names=classes, output_dir=str(tmp_path))
    images = sorted((data / "imagesTs").iterdir())
    found = segmentations(tmp_path)
    assert list(found) == [image.name.replace(".nii.gz", "_seg.nii.gz") for image in images]
    for image, segmentation in zip(map(nib.load, images), found.values(), strict=True):
        assert segmentation.shape == image.shape
        np.testing.assert_allclose(segmentation.affine, image.affine, atol=1e-4)
        values = np.asarray(segmentation.dataobj)
        assert np.issubdtype(values.dtype, np.integer)
        assert set(np.unique(values)) <= set(range(len(classes) + 1))


def test_inference_on_an_oblique_image_of_another_orientation_keeps_its_grid(tmp_path: Path, tuned: Trained) -> None:
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-7.0, 6.0, 9.0])
    affine[:3, 3] = 10, -20, 30
    voxels = np.random.default_rng(0).integers(-900, 900, (37, 29, 5)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "scan.nii.gz")
    overrides = {"class_names": ["kidney"], "output_dir": str(tmp_path / "out"), "images": str(tmp_path / "*.nii.gz")}
    run("inference", tuned.bundle, tmp_path, **overrides)
    [segmentation] = segmentations(tmp_path / "out").values()
    assert segmentation.shape == voxels.shape
    np.testing.assert_allclose(segmentation.affine, affine, atol=1e-4)


def test_adapters_of_two_trainings_are_composed(
    tmp_path: Path, data: Path, pretrained: Trained, tuned: Trained
) -> None:
    learnt(data, pretrained, tmp_path, new_class="aorta", epochs=1)
    adapters = {
        "aorta": str(tmp_path / "models" / "adapters" / "aorta.safetensors"),
        "kidney": str(tuned.bundle / "models" / "adapters" / "kidney.safetensors"),
    }
    image = torch.randn(2, 1, 32, 32, 1)
    margins = {}
    for name, classes in {"all": ["liver", "kidney", "aorta"], "kidney": ["kidney"], "aorta": ["aorta"]}.items():
        flow = run(
            "inference",
            pretrained.bundle,
            data,
            class_names=classes,
            adapters={name: file for name, file in adapters.items() if name in classes},
            adapter_dir=str(tmp_path / "none"),
            output_dir=str(tmp_path / name),
        )
        assert len(segmentations(tmp_path / name)) == 2
        with torch.no_grad():
            margins[name] = parsed(flow, "network").eval()(image)
    assert margins["all"].shape[1] == 4
    torch.testing.assert_close(margins["all"][:, 2], margins["kidney"][:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(margins["all"][:, 3], margins["aorta"][:, 1], atol=1e-5, rtol=0)
    assert not torch.equal(margins["kidney"], margins["aorta"])


def test_evaluation_of_base_classes_and_new_class_on_the_test_section(
    tmp_path: Path, data: Path, tuned: Trained
) -> None:
    overrides = {"eval_classes": ["spleen", "kidney", "liver"], "eval_section": "test", "output_dir": str(tmp_path)}
    flow = run("evaluate", tuned.bundle, data, **overrides)
    assert 0 <= parsed(flow, "validate::evaluator").state.metrics["val_mean_dice"] <= 1
    rows = (tmp_path / "val_mean_dice_raw.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3  # a head and two cases
    assert [len(row.replace(",", "\t").split("\t")) for row in rows] == [5, 5, 5]  # file, three classes, mean


# Commands


def test_every_command_runs_from_a_foreign_folder(
    tmp_path: Path, data: Path, pretrained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign, bundle = tmp_path / "elsewhere", copy_bundle(tmp_path)
    foreign.mkdir()
    monkeypatch.chdir(foreign)
    run("pretrain", bundle, data, epochs=1)
    run("train", bundle, data, epochs=1)
    run("evaluate", bundle, data)
    run("inference", bundle, data, class_names=["liver", "spleen", "kidney"])
    assert not files_below(foreign)
    made = {path.name for path in files_below(bundle / "models", bundle / "eval")}
    assert {"model.pt", "kidney.safetensors", "metrics.csv"} <= made


def test_paths_follow_the_bundles_folder_when_run_inside_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_bundle(tmp_path)
    shutil.copytree(data, bundle / "data")
    monkeypatch.chdir(bundle)
    run("pretrain", Path("."), Path("data"), epochs=1)
    assert (bundle / "models" / "model.pt").is_file()


def in_two_processes(config: str, settings: dict[str, Any], bundle: Path, data: Path, cwd: Path) -> None:
    names = [Path(file).name for file in (*config_files(bundle, config), f"multi_gpu_{config}.json")]
    files = [str(bundle / "configs" / name) for name in names]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run")
    overrides = {**settings, "config_file": files, "bundle_root": bundle, "dataset_dir": data}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command(*torchrun, **overrides), cwd=cwd, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path, data: Path) -> None:
    bundle = copy_bundle(tmp_path)
    in_two_processes("pretrain", {**PUNET.settings["pretrain"], "epochs": 1}, bundle, data, tmp_path)
    assert [path.name for path in files_below(bundle / "models")] == ["model.pt"]
    assert len(list((bundle / "eval" / "checkpoints").iterdir())) == 1
    before = state_in(bundle / "models" / "model.pt")
    in_two_processes("train", {**PUNET.settings["train"], "epochs": 1}, bundle, data, tmp_path)
    names = {path.name for path in files_below(bundle / "models")}
    assert names == {"model.pt", "kidney.safetensors"}
    after = state_in(bundle / "models" / "model.pt")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
