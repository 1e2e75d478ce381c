"""The bundle for classification at work on small pictures: training, evaluation, inference, methods, bad input."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from monai_petl import inspect_adapter
from monai_petl.data import DataError, require_images
from tests.bundles.helpers import (
    CLASSIFIER,
    Bundle,
    Trained,
    files_below,
    parsed,
    refusal,
    state_in,
    train_in_two_processes,
)

ADAPTER = Path("models") / "adapters" / "lora.safetensors"


@pytest.fixture(scope="module")
def trained(train_once: Callable[[Bundle], Trained]) -> Trained:
    return train_once(CLASSIFIER)


@pytest.fixture
def weights(trained: Trained, checkpoint: Path) -> dict[str, str]:
    return {"pretrained_path": str(checkpoint), "ckpt_path": str(trained.model)}


def metrics(flow: ConfigWorkflow) -> dict[str, float]:
    return parsed(flow, "validate::evaluator").state.metrics


def rows_of(root: Path) -> list[dict[str, str]]:
    with (root / "eval" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_it_learns_what_is_easily_seen(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    flow = CLASSIFIER.run(
        "train", tmp_path, images, pretrained_path=str(checkpoint), epochs=2, epoch_length=30, lr=0.02, affine_prob=0.0
    )
    assert metrics(flow)["val_balanced_accuracy"] == 1.0
    assert metrics(flow)["val_accuracy"] == 1.0
    assert metrics(flow)["val_auc"] == 1.0


def test_metrics_are_those_of_their_definitions(images: Path, tmp_path: Path) -> None:
    flow = CLASSIFIER.workflow("train", tmp_path, images)
    output = [
        {"pred": torch.tensor(scores), "label": label}
        for scores, label in [([0.6, 0.3, 0.1], 0), ([0.2, 0.7, 0.1], 0), ([0.1, 0.5, 0.4], 1), ([0.3, 0.3, 0.4], 2)]
    ]
    recall = parsed(flow, "validate::key_metric")["val_balanced_accuracy"]
    recall.reset()
    recall.update(recall._output_transform(output))
    assert recall.compute() == pytest.approx((0.5 + 1 + 1) / 3)


def test_evaluation_finds_what_validation_found_by_the_model_and_by_the_adapter(
    trained: Trained, weights: dict[str, str], images: Path, tmp_path: Path
) -> None:
    best = parsed(trained.workflow, "validate::evaluator").state.best_metric
    for files in ({}, {"adapter_path": str(trained.bundle / ADAPTER), "ckpt_path": str(tmp_path / "none.pt")}):
        flow = CLASSIFIER.run("evaluate", tmp_path, images, **{**weights, **files})
        assert metrics(flow)["val_balanced_accuracy"] == pytest.approx(best)
    assert "val_auc" in (tmp_path / "eval" / "metrics.csv").read_text(encoding="utf-8")


def test_inference_writes_a_table_of_probabilities(
    trained: Trained, weights: dict[str, str], images: Path, tmp_path: Path
) -> None:
    CLASSIFIER.run("inference", tmp_path / "a", images, **weights)
    files = {"adapter_path": str(trained.bundle / ADAPTER), "ckpt_path": str(tmp_path / "none.pt")}
    pattern = str(images / "test" / "*" / "*.png")
    CLASSIFIER.run("inference", tmp_path / "b", tmp_path / "none", images=pattern, **{**weights, **files})
    first, second = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert len(first) == 6
    assert sorted(row["file"] for row in first) == sorted(str(path) for path in images.glob("test/*/*.png"))
    assert sorted(first, key=lambda row: row["file"]) == sorted(second, key=lambda row: row["file"])
    for row in first:
        scores = {name: float(row[name]) for name in ("normal", "benign", "malignant")}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(scores, key=lambda name: scores[name])


def test_the_backbone_is_that_of_the_file_bit_for_bit_after_training(
    trained: Trained, checkpoint: Path, images: Path
) -> None:
    fresh = CLASSIFIER.workflow("train", trained.bundle, images, pretrained_path=str(checkpoint), method="head")
    plain = parsed(fresh, "adapted_network").backbone.state_dict()
    kept = state_in(trained.model)
    assert all(torch.equal(tensor, kept[f"backbone.{name}"]) for name, tensor in plain.items())
    header = inspect_adapter(trained.bundle / ADAPTER)
    assert header["notes"] | {"labelled_images": 12} == header["notes"]


@pytest.mark.parametrize("method", ["head", "bias", "vpt", "vpetl", "ssf", "full", "scratch"])
def test_other_methods_run_in_the_same_bundle(method: str, tmp_path: Path, images: Path, checkpoint: Path) -> None:
    CLASSIFIER.run(
        "train",
        tmp_path,
        images,
        pretrained_path=str(checkpoint),
        method=method,
        epochs=1,
        epoch_length=2,
        num_labelled=2,
    )
    header = inspect_adapter(tmp_path / "models" / "adapters" / f"{method}.safetensors")
    assert header["notes"]["labelled_images"] == 6
    assert header["notes"]["class_names"] == ["normal", "benign", "malignant"]


def test_all_classes_are_drawn_equally_often(tmp_path: Path, images: Path) -> None:
    uneven = Path(shutil.copytree(images, tmp_path / "data"))
    for i in range(1, 4):
        (uneven / "training" / "benign" / f"benign_{i}.png").unlink()
    flow = CLASSIFIER.workflow("train", tmp_path, uneven, epoch_length=150, batch_size=2)
    labels = [case["label"] for case in parsed(flow, "train::datalist")]
    drawn = torch.tensor([labels[i] for i in parsed(flow, "train::sampler")]).bincount()
    assert drawn.sum() == 300
    assert drawn.min() > 60


def test_images_are_prepared_alike_in_training_and_inference(tmp_path: Path, images: Path) -> None:
    for path in sorted((images / "test").rglob("*.png"))[:2]:  # grey, and with transparency
        seen = []
        for name, section in (("train", "validate::preprocessing"), ("inference", "preprocessing")):
            flow = CLASSIFIER.workflow(name, tmp_path, images)
            seen.append(parsed(flow, section)({"image": str(path), "label": 1})["image"])
        assert torch.equal(*seen)
        assert seen[0].shape == (3, 32, 32)
        assert -3 < seen[0].min() < seen[0].max() < 3


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    bundle = CLASSIFIER.copy(tmp_path)
    train_in_two_processes(CLASSIFIER, bundle, images, pretrained_path=checkpoint)
    assert {path.name for path in files_below(bundle / "models")} == {"model.pt", "lora.safetensors"}


# Bad input


@pytest.fixture
def broken(tmp_path: Path, images: Path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "data"))


def test_missing_data_is_named(tmp_path: Path, weights: dict[str, str]) -> None:
    for config in CLASSIFIER.settings:
        refusal(CLASSIFIER, config, tmp_path / "run", tmp_path / "none", "dataset_dir names no folder", **weights)
    refusal(
        CLASSIFIER,
        "inference",
        tmp_path / "run",
        tmp_path,
        "no file matches images=",
        images="nothing/*.png",
        **weights,
    )


@pytest.mark.parametrize("section", ["training", "validation"])
def test_an_image_that_cannot_be_decoded_is_named_before_training(
    section: str, tmp_path: Path, broken: Path, weights: dict[str, str]
) -> None:
    path = broken / section / "benign" / "benign_0.png"
    path.write_bytes(path.read_bytes()[:60])
    refusal(
        CLASSIFIER,
        "train",
        tmp_path / "run",
        broken,
        r"benign_0\.png cannot be read",
        **weights,
    )


def test_an_image_that_cannot_be_decoded_is_named_before_inference(
    tmp_path: Path, broken: Path, weights: dict[str, str]
) -> None:
    (broken / "test" / "benign" / "benign_0.png").write_text("no image", encoding="utf-8")
    refusal(CLASSIFIER, "inference", tmp_path / "run", broken, r"benign_0\.png cannot be read", **weights)


def test_a_class_without_images_and_one_outside_the_list_are_named(
    tmp_path: Path, images: Path, weights: dict[str, str]
) -> None:
    classes = ["normal", "benign", "malignant", "odd"]
    refusal(
        CLASSIFIER,
        "train",
        tmp_path / "run",
        images,
        "is of the class odd; found: benign, malignant, normal",
        class_names=classes,
        **weights,
    )
    refusal(
        CLASSIFIER,
        "train",
        tmp_path / "run",
        images,
        "images of the class 'malignant'",
        class_names=classes[:2],
        **weights,
    )


def test_more_labelled_images_than_there_are(tmp_path: Path, images: Path, weights: dict[str, str]) -> None:
    refusal(
        CLASSIFIER,
        "train",
        tmp_path / "run",
        images,
        "9 images of each class were asked for, but there are 4 of",
        num_labelled=9,
        **weights,
    )


def test_sixteen_bits_are_read_as_a_window_for_them_read_them_and_the_window_is_refused(tmp_path: Path) -> None:
    """Adapters that were trained with ``intensity_window`` [0, 65535] get the same intensities without it."""
    values = (torch.arange(1024).view(32, 32) * 60).numpy().astype("uint16")
    Image.fromarray(values).save(tmp_path / "deep.png")
    scaling = {"intensity_window": [0, 255], "image_mean": [0, 0, 0], "image_std": [1, 1, 1], "img_size": [32, 32]}
    flow = CLASSIFIER.workflow("inference", tmp_path, tmp_path, **scaling)
    seen = parsed(flow, "preprocessing")({"image": str(tmp_path / "deep.png")})["image"]
    torch.testing.assert_close(
        seen.as_tensor(), torch.tensor(values / 65535).float().expand(3, 32, 32), atol=1e-5, rtol=0
    )
    cases = [{"image": str(tmp_path / "deep.png")}]
    with pytest.raises(
        DataError, match=r"intensity_window is \[0, 65535\], but pictures such as .*deep.png are read from 0"
    ):
        require_images(cases, tmp_path, intensity_window=[0, 65535])
    require_images(cases, tmp_path, intensity_window=[0, 255])
