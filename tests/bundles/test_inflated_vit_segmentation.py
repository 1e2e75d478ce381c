"""The bundle of inflated vision transformers at work on phantoms: every method, evaluation, inference, several processes."""

from __future__ import annotations

import copy
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
from safetensors.torch import save_file

from monai_petl import inspect_adapter
from monai_petl.methods import METHODS
from monai_petl.networks import load_backbone
from tests.bundles.helpers import (
    INFLATED,
    Trained,
    checkpoint_state,
    command,
    files_below,
    messages,
    parsed,
    segmentations,
    state_in,
)

CLASSES = ["liver", "spleen", "kidney", "aorta"]
VOLUMETRIC = {
    "center_slice": False,
    "token_size": [8, 8, 2],
    "patch_size": [32, 32, 4],
    "slab_size": [32, 32, 4],
    "attention_bias": "class_key",
}


def last_loss(flow: Any) -> float:
    """The loss of the last training step."""
    output = parsed(flow, "train::trainer").state.output
    return torch.as_tensor((output[0] if isinstance(output, list) else output)["loss"]).item()


def key_metric(flow: Any) -> float:
    return parsed(flow, "validate::evaluator").state.metrics["val_mean_dice"]


# Training


@pytest.mark.parametrize("method", [name for name in METHODS if name != "aim"])  # which is for 2D
def test_every_method_trains_and_evaluates_to_what_validation_found(
    method: str, tmp_path: Path, data: Path, checkpoint: Path
) -> None:
    path = {"pretrained_path": str(checkpoint)}
    flow = INFLATED.run("train", tmp_path, data, **path, method=method, lr=0.01, backbone_lr=0.001)
    assert math.isfinite(last_loss(flow))
    best = parsed(flow, "validate::evaluator").state.best_metric
    assert key_metric(INFLATED.run("evaluate", tmp_path, data, **path, method=method)) == pytest.approx(best, abs=1e-4)
    adapter = tmp_path / "models" / "adapters" / f"{method}.safetensors"
    flow = INFLATED.run("evaluate", tmp_path, data, **path, adapter_path=str(adapter), ckpt_path=str(tmp_path / "none"))
    assert key_metric(flow) == pytest.approx(best, abs=1e-4)
    trained = inspect_adapter(adapter)["shapes"]
    assert any(name.startswith("decoder.") for name in trained)
    assert any(name.startswith("backbone.") for name in trained) == (method != "head")


def test_frozen_backbone_is_the_inflated_checkpoint_bit_for_bit_after_training(
    inflated: Trained, checkpoint: Path
) -> None:
    network = load_backbone(copy.deepcopy(parsed(inflated.workflow, "network_def")), checkpoint)
    state = state_in(inflated.model)
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, state[f"backbone.{name}"]), name


def test_full_fine_tuning_changes_the_backbone_and_scratch_needs_no_checkpoint(
    tmp_path: Path, data: Path, checkpoint: Path
) -> None:
    flow = INFLATED.run("train", tmp_path, data, method="full", pretrained_path=str(checkpoint), backbone_lr=0.01)
    network, start = parsed(flow, "adapted_network"), load_backbone(parsed(flow, "network_def"), checkpoint)
    assert network is start  # which has overwritten what was trained
    trained = state_in(tmp_path / "models" / "model.pt")
    unused = "norm_cross_attn"
    for name, tensor in start.backbone.state_dict().items():
        assert torch.equal(tensor, trained[f"backbone.{name}"]) == (unused in name), name
    INFLATED.run("train", tmp_path / "scratch", data, method="scratch", epochs=1)


@pytest.mark.parametrize("inflation", ["center", "average"])
def test_depth_of_the_patches_is_filled_as_asked_for(
    inflation: str, tmp_path: Path, data: Path, checkpoint: Path
) -> None:
    settings = {"pretrained_path": str(checkpoint), "inflation": inflation, "epochs": 1}
    INFLATED.run("train", tmp_path, data, **settings)
    kernel = state_in(tmp_path / "models" / "model.pt")["backbone.patch_embedding.patch_embeddings.weight"]
    flat = checkpoint_state()["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(kernel.sum(-1), flat)
    expected = [flat / 3] * 3 if inflation == "average" else [0 * flat, flat, 0 * flat]
    torch.testing.assert_close(kernel, torch.stack(expected, -1))


def test_network_of_several_patches_along_depth_trains_and_segments(
    tmp_path: Path, data: Path, checkpoint: Path
) -> None:
    flow = INFLATED.run("train", tmp_path, data, pretrained_path=str(checkpoint), **VOLUMETRIC)
    best = parsed(flow, "validate::evaluator").state.best_metric
    assert key_metric(INFLATED.run("evaluate", tmp_path, data, **VOLUMETRIC)) == pytest.approx(best, abs=1e-4)
    settings = {key: value for key, value in VOLUMETRIC.items() if key != "slab_size"}
    INFLATED.run("inference", tmp_path, data, **settings)
    assert len(segmentations(tmp_path / "eval")) == 2


def test_window_of_one_slice_is_the_2d_network(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    sizes = {"patch_size": [32, 32, 1], "slab_size": [32, 32, 1], "token_size": [8, 8, 1]}
    INFLATED.run("train", tmp_path, data, pretrained_path=str(checkpoint), epochs=1, **sizes)
    kernel = state_in(tmp_path / "models" / "model.pt")["backbone.patch_embedding.patch_embeddings.weight"]
    torch.testing.assert_close(kernel[..., 0], checkpoint_state()["patch_embed.proj.weight"].sum(1, keepdim=True))


def test_patch_larger_than_the_volume_is_padded(tmp_path: Path, data: Path) -> None:
    large = {"patch_size": [64, 48, 11], "token_size": [8, 8, 11]}
    INFLATED.run("train", tmp_path, data, pretrained_path=None, slab_size=[64, 48, 11], **large)
    INFLATED.run("inference", tmp_path, data, **large)
    for image in (data / "imagesTs").iterdir():
        name = image.name.replace(".nii.gz", "_seg.nii.gz")
        assert segmentations(tmp_path / "eval")[name].shape == nib.load(image).shape


def test_training_draws_the_label_of_the_center_slice(tmp_path: Path, data: Path) -> None:
    flow = INFLATED.workflow("train", tmp_path, data, pretrained_path=None)
    batch = next(iter(parsed(flow, "train::dataloader")))
    assert batch["image"].shape == (4, 1, 32, 32, 3)
    assert batch["label"].shape == (4, 1, 32, 32, 1)
    slabs = parsed(flow, "train::slab_transforms")
    case = parsed(flow, "train::datalist")[0]
    for transform in parsed(flow, "train::deterministic_transforms"):
        case = transform(case) if transform is not None else case
    before = case["image"]
    for transform in slabs:
        case = transform(case)
    assert case["image"].shape[-1] == before.shape[-1] + 2
    assert torch.equal(case["image"][..., 0], before[..., 0])
    assert torch.equal(case["image"][..., -1], before[..., -1])


def test_adapter_file_notes_how_it_was_trained(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    INFLATED.run("train", tmp_path, data, pretrained_path=str(checkpoint), num_labelled=1, epochs=1)
    notes = inspect_adapter(tmp_path / "models/adapters/head.safetensors")["notes"]
    assert notes["class_names"] == CLASSES
    assert notes["pretrained"] == checkpoint.name
    assert notes["inflation"] == "center"
    assert notes["labelled_volumes"] == 1
    assert "val_mean_dice" in notes


def test_training_goes_on_where_it_stopped(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    settings = {"pretrained_path": str(checkpoint), "epochs": 3}
    flow = INFLATED.workflow("train", tmp_path, data, **settings)
    flow.initialize()
    trainer = parsed(flow, "train::trainer")
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda engine: engine.terminate())
    flow.run()
    [saved] = (tmp_path / "eval" / "checkpoints").glob("*.pt")
    flow = INFLATED.run("train", tmp_path, data, **settings, resume_path=str(saved))
    assert parsed(flow, "lr_scheduler").last_epoch == 3 * INFLATED.settings["train"]["epoch_length"]


def test_two_losses_can_be_chosen(tmp_path: Path, data: Path) -> None:
    flow = INFLATED.run("train", tmp_path, data, pretrained_path=None, epochs=1, segmentation_loss="dice_focal")
    assert type(parsed(flow, "loss")).__name__ == "DiceFocalLoss"


# Inference


def test_inference_agrees_with_evaluation(tmp_path: Path, data: Path, inflated: Trained) -> None:
    flow = INFLATED.run("evaluate", inflated.bundle, data, eval_section="test", output_dir=str(tmp_path / "scores"))
    INFLATED.run("inference", inflated.bundle, data, output_dir=str(tmp_path / "out"))
    scores = []
    for case in parsed(flow, "validate::datalist"):
        name = Path(case["image"]).name.replace(".nii.gz", "_seg.nii.gz")
        segmentation, image = segmentations(tmp_path / "out")[name], nib.load(case["image"])
        assert segmentation.shape == image.shape
        np.testing.assert_allclose(segmentation.affine, image.affine, atol=1e-4)
        found, label = np.asarray(segmentation.dataobj), np.asarray(nib.load(case["label"]).dataobj)
        ids = parsed(flow, "train::label_ids")
        scores += [dice(found == k, label == ids[name]) for k, name in enumerate(CLASSES, 1)]
    assert np.mean(scores) == pytest.approx(key_metric(flow), abs=1e-4)


def dice(found: np.ndarray, label: np.ndarray) -> float:
    return float(2 * (found & label).sum() / (found.sum() + label.sum()))


# Weights that do not fit


def refused(name: str, root: Path, data: Path, sentence: str, **overrides: Any) -> None:
    """Running a config fails with that sentence, and leaves no file behind."""
    before = files_below(root)
    with pytest.raises(Exception) as error:  # noqa: PT011 (MONAI wraps what is raised; the sentence is what counts)
        INFLATED.run(name, root, data, **overrides)
    said = list(messages(error.value))
    assert any(sentence in text for text in said), said
    assert files_below(root) == before


def test_checkpoint_that_is_missing_or_does_not_fit_is_named(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    root, short, other = tmp_path / "run", tmp_path / "short.safetensors", tmp_path / "other.safetensors"
    short.write_bytes(checkpoint.read_bytes()[:3000])
    save_file({"layer.weight": torch.zeros(2)}, other)
    missing = str(tmp_path / "none.safetensors")
    for method in ("head", "full"):
        refused("train", root, data, missing, pretrained_path=missing, method=method)
        refused("train", root, data, "pretrained.safetensors", method=method)  # the default, which is not there
        refused("train", root, data, str(short), pretrained_path=str(short), method=method)
        refused("train", root, data, "names of no known family", pretrained_path=str(other), method=method)
    found = (
        f"{checkpoint} does not fit the network's settings: it has mlp_dim 96, num_layers 4, the network mlp_dim 48, "
    )
    refused("train", root, data, found, pretrained_path=str(checkpoint), mlp_dim=48, num_layers=2)
    refused("train", root, data, "norm_eps 1e-06", pretrained_path=str(checkpoint), norm_eps=1e-12)
    refused("train", root, data, "patch", pretrained_path=str(checkpoint), token_size=[16, 16, 3])


def test_settings_that_do_not_exist_are_named(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    weights = {"pretrained_path": str(checkpoint)}
    refused("train", tmp_path, data, "; got 'prompt'", **weights, method="prompt")
    refused("train", tmp_path, data, "mode must be one of center, average, got 'middle'", **weights, inflation="middle")
    sentence = "img_size must be multiples of the backbone's patches of (8, 8, 3) voxels, got (36, 32, 3)"
    refused("train", tmp_path, data, sentence, **weights, patch_size=[36, 32, 3])
    sentence = "has no class named pancreas; its classes are liver, spleen, kidney, aorta, spine"
    refused("train", tmp_path, data, sentence, **weights, class_names=["liver", "pancreas"])


@pytest.mark.parametrize("name", ["evaluate", "inference"])
def test_trained_network_that_is_missing_or_does_not_fit_is_named(
    name: str, tmp_path: Path, data: Path, inflated: Trained, checkpoint: Path
) -> None:
    root, short = tmp_path / "run", tmp_path / "short.pt"
    short.write_bytes(inflated.model.read_bytes()[:5000])
    refused(name, root, data, f"no pre-trained network at {root}/models/model.pt")
    refused(name, root, data, f"{short} cannot be read", ckpt_path=str(short))
    model = {"ckpt_path": str(inflated.model)}
    refused(name, root, data, "and the network settings that the file was trained with", **model, feature_size=8)
    adapter = inflated.bundle / "models" / "adapters" / "head.safetensors"
    paths = {"adapter_path": str(adapter), "pretrained_path": str(checkpoint)}
    refused(name, root, data, "was trained on another backbone", **paths, inflation="average")
    refused(name, root, data, "no adapter file", **{**paths, "adapter_path": str(tmp_path / "none.safetensors")})


# Commands


def test_every_command_runs_from_a_foreign_folder(
    tmp_path: Path, data: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign, bundle = tmp_path / "elsewhere", INFLATED.copy(tmp_path)
    foreign.mkdir()
    (bundle / "models").mkdir()
    shutil.copy(checkpoint, bundle / "models" / "pretrained.safetensors")
    monkeypatch.chdir(foreign)
    INFLATED.run("train", bundle, data, epochs=1)
    INFLATED.run("evaluate", bundle, data)
    INFLATED.run("inference", bundle, data)
    assert not files_below(foreign)
    made = {path.name for path in files_below(bundle / "models", bundle / "eval")}
    assert {"model.pt", "head.safetensors", "metrics.csv"} <= made


@pytest.mark.slow
@pytest.mark.parametrize("method", ["head", "full"])
def test_two_processes_train_one_model(method: str, tmp_path: Path, data: Path, checkpoint: Path) -> None:
    bundle = INFLATED.copy(tmp_path)
    files = [str(bundle / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train")]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run")
    settings = {**INFLATED.settings["train"], "epochs": 1, "method": method, "pretrained_path": checkpoint}
    overrides = {**settings, "config_file": files, "bundle_root": bundle, "dataset_dir": data}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command(*torchrun, **overrides), cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.name for path in files_below(bundle / "models")} == {"model.pt", f"{method}.safetensors"}
