"""The FPT bundle: stored features, the same without, both variants, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from monai_petl import inspect_adapter, trainable_parameters
from tests.bundles.helpers import FINE_GRAINED, files_below, messages, parsed, refusal, train_in_two_processes
from tests.conftest import differing

LEARNING = {"epochs": 2, "epoch_length": 30, "lr": 5e-3, "val_interval": 2}


def preload(root: Path, images: Path, cache: Path, **options) -> ConfigWorkflow:
    configs = FINE_GRAINED.path / "configs"
    settings = {
        **FINE_GRAINED.settings["train"],
        "bundle_root": str(root),
        "dataset_dir": str(images),
        "cache_dir": str(cache),
        **options,
    }
    flow = ConfigWorkflow(
        [str(configs / "train.json"), str(configs / "preload.json")],
        logging_file=False,
        workflow_type="train",
        **settings,
    )
    flow.initialize()
    flow.run()
    flow.finalize()
    return flow


def metrics(flow: ConfigWorkflow) -> dict[str, float]:
    return parsed(flow, "validate::evaluator").state.metrics


def test_it_learns_from_stored_features_and_without(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    weights = {"pretrained_path": str(checkpoint)}
    cache = tmp_path / "features"
    preload(tmp_path, images, cache, **weights)
    stored = list(cache.glob("*.safetensors"))
    assert len(stored) == len({path.read_bytes() for path in images.rglob("*.png")})
    network = parsed(FINE_GRAINED.workflow("train", tmp_path, images, **weights), "network_def")
    layers, heads, tokens, channels = network.states_shape()
    assert 0 <= stored[0].stat().st_size - 2 * layers * heads * tokens * channels * 2 < 4096
    found = {}
    for name, options in (("stored", {"cache_dir": str(cache)}), ("computed", {})):
        root = tmp_path / name
        flow = FINE_GRAINED.run("train", root, images, **weights, **LEARNING, **options)
        assert metrics(flow)["val_balanced_accuracy"] == 1.0
        adapter = root / "models" / "adapters" / "fpt_plus.safetensors"
        assert inspect_adapter(adapter)["notes"]["method"] == "fpt_plus"
        flow = FINE_GRAINED.run(
            "evaluate", root, images, **weights, **options, adapter_path=str(adapter), ckpt_path=str(root / "none")
        )
        assert metrics(flow)["val_balanced_accuracy"] == 1.0
        FINE_GRAINED.run("inference", root, images)
        with (root / "eval" / "predictions.csv").open(encoding="utf-8", newline="") as file:
            found[name] = list(csv.DictReader(file))
        assert all(Path(row["file"]).parent.name == row["prediction"] for row in found[name])
    assert len(found["stored"]) == len(found["computed"]) > 0


def test_stored_features_are_those_that_training_computes(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    weights = {"pretrained_path": str(checkpoint)}
    preload(tmp_path, images, tmp_path / "features", **weights, cache_dtype="float32")
    options = {"cache_dir": str(tmp_path / "features"), "cache_dtype": "float32"}
    cases = []
    for settings in (options, {}):
        flow = FINE_GRAINED.workflow("train", tmp_path, images, **weights, **settings)
        flow.initialize()
        cases.append(parsed(flow, "validate::dataset")[0])
        network = parsed(flow, "adapted_network").eval()
    keys, values = network.encode(cases[1]["source"][None])
    assert torch.equal(torch.as_tensor(cases[0]["image"]), torch.as_tensor(cases[1]["image"]))
    assert "source" not in cases[0]
    torch.testing.assert_close(cases[0]["key_states"], keys[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cases[0]["value_states"], values[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "layers"), [("fpt", (0, 1, 2, 3)), ("side", (2, 3))])
def test_the_other_forms_run(
    method: str, layers: tuple[int, ...], tmp_path: Path, images: Path, checkpoint: Path
) -> None:
    options = {"pretrained_path": str(checkpoint), "method": method}
    flow = FINE_GRAINED.run("train", tmp_path, images, **options)
    network = parsed(flow, "adapted_network")
    assert network.layers == layers
    assert 0 <= metrics(FINE_GRAINED.run("evaluate", tmp_path, images, method=method))["val_auc"] <= 1


def test_features_of_other_weights_or_settings_are_refused(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    cache, weights = tmp_path / "features", {"pretrained_path": str(checkpoint)}
    preload(tmp_path, images, cache, **weights)
    for options, difference in (
        ({"token_ratio": 0.5}, r"token_ratio \(0.2 there, 0.5 now\)"),
        ({"img_size": [48, 48]}, r"img_size \(\[64, 64\] there, \[48, 48\] now\)"),
        ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean \(\[0.485"),
        ({"pretrained_path": None}, r"weights \('\w+' there, '\w+' now\)"),
        ({"cache_dtype": "float32"}, r"dtype \('float16' there, 'float32' now\)"),
    ):
        settings = {**weights, "cache_dir": str(cache), **options}
        refusal(FINE_GRAINED, "train", tmp_path / "run", images, f"made otherwise: {difference}", **settings)


def test_missing_features_and_bad_images_are_named(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    weights = {"pretrained_path": str(checkpoint)}
    empty = {**weights, "cache_dir": str(tmp_path / "none")}
    refusal(FINE_GRAINED, "train", tmp_path / "run", images, "holds no features of .*png; compute them first", **empty)
    refusal(FINE_GRAINED, "train", tmp_path / "run", images, "got .lora.", **weights, method="lora")
    refusal(FINE_GRAINED, "train", tmp_path / "run", tmp_path / "nothing", "dataset_dir names no folder", **weights)
    with pytest.raises(Exception) as error:  # noqa: PT011 (MONAI wraps what is raised; the sentence is what counts)
        preload(tmp_path, tmp_path / "nothing", tmp_path / "features", **weights)
    assert any("dataset_dir names no folder" in text for text in messages(error.value))
    assert not (tmp_path / "features").exists()


def test_the_ids_of_preload_are_those_of_training() -> None:
    preloading = json.loads((FINE_GRAINED.path / "configs" / "preload.json").read_text(encoding="utf-8"))
    training = FINE_GRAINED.config("train")
    steps = preloading["source_transforms"]["transforms"]
    wanted = [
        {key: value for key, value in step.items() if key != "_disabled_"}
        for step in training["train"]["deterministic_transforms"]
        if not step["_target_"].endswith("LoadFeaturesd")
    ]
    assert steps == wanted


def test_stored_features_need_no_transformer_on_the_device(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    weights = {"pretrained_path": str(checkpoint)}
    for options in ({}, {"cache_dir": str(tmp_path / "features")}):
        flow = FINE_GRAINED.workflow("train", tmp_path, images, **weights, **options)
        flow.initialize()
        whole = parsed(flow, "adapted_network")
        assert parsed(flow, "network") is (whole.side if options else whole)


def test_the_learning_rate_falls_by_half_a_cosine(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    flow = FINE_GRAINED.workflow(
        "train", tmp_path, images, pretrained_path=str(checkpoint), epochs=20, epoch_length=5, lr=2e-4
    )
    flow.initialize()
    optimizer, schedule = parsed(flow, "optimizer"), parsed(flow, "lr_scheduler")
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2e-4)
    assert rates[50] == pytest.approx(1e-4)
    assert 0 < rates[99] < 2e-6
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


def test_the_learning_rate_falls_with_every_step_of_a_training(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    flow = FINE_GRAINED.workflow("train", tmp_path, images, pretrained_path=str(checkpoint), lr=1e-3)
    flow.initialize()
    trainer, optimizer, rates = parsed(flow, "train::trainer"), parsed(flow, "optimizer"), []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    flow.run()
    assert trainer.state.max_epochs == trainer.state.epoch_length == 2
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])


def test_the_gradient_of_a_step_has_a_norm_of_one_at_most(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    flow = FINE_GRAINED.workflow("train", tmp_path, images, pretrained_path=str(checkpoint))
    flow.initialize()
    norms: list[float] = []
    trained = trainable_parameters(parsed(flow, "adapted_network"))
    parsed(flow, "loss").register_forward_hook(lambda module, inputs, loss: 1000 * loss)
    parsed(flow, "optimizer").register_step_pre_hook(
        lambda *_: norms.append(float(torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])))
    )
    flow.run()
    assert norms == pytest.approx([1.0] * 4, abs=1e-3)


def test_the_large_image_is_never_augmented(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    for cache_rate in (0.0, 1.0):
        flow = FINE_GRAINED.workflow("train", tmp_path, images, pretrained_path=str(checkpoint), cache_rate=cache_rate)
        flow.initialize()
        training = parsed(flow, "train::dataset")
        drawn = [training[0] for _ in range(5)]
        assert all(torch.equal(case["source"], drawn[0]["source"]) for case in drawn)
        assert not any(torch.equal(case["image"], drawn[0]["image"]) for case in drawn[1:])
        plain = parsed(flow, "validate::preprocessing")(parsed(flow, "train::datalist")[0])
        assert torch.equal(plain["source"], drawn[0]["source"])


def test_without_validation_the_network_of_the_end_is_kept(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    shutil.rmtree(data / "validation")
    weights = {"pretrained_path": str(checkpoint)}
    last = parsed(FINE_GRAINED.run("train", tmp_path, data, **weights), "adapted_network").state_dict()
    adapter = str(tmp_path / "models" / "adapters" / "fpt_plus.safetensors")
    first = parsed(FINE_GRAINED.workflow("train", tmp_path, data, **weights), "adapted_network").state_dict()
    assert differing(first, last)
    for files in ({}, {"adapter_path": adapter, "ckpt_path": str(tmp_path / "none.pt"), **weights}):
        flow = FINE_GRAINED.run("evaluate", tmp_path, data, eval_section="test", **files)
        assert not differing(last, parsed(flow, "adapted_network").state_dict())


@pytest.mark.parametrize("section", ["training", "validation", "test"])
def test_a_jpeg_that_was_cut_is_named_before_anything_is_computed(
    section: str, tmp_path: Path, images: Path, checkpoint: Path
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    cut = data / section / "benign" / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    weights = {"pretrained_path": str(checkpoint)}
    sentence = r"cut\.jpg cannot be read: image file is truncated"
    if section != "test":
        refusal(FINE_GRAINED, "train", tmp_path / "run", data, sentence, **weights)
    with pytest.raises(Exception) as error:  # noqa: PT011 (as below)
        preload(tmp_path, data, tmp_path / "features", **weights)
    assert any(re.search(sentence, text) for text in messages(error.value))
    assert not (tmp_path / "features").exists()


def test_a_class_with_one_image(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    """It is in the training section alone: what is undefined is left out."""
    data, weights = Path(shutil.copytree(images, tmp_path / "data")), {"pretrained_path": str(checkpoint)}
    for section in ("training", "validation", "test"):
        for path in sorted((data / section / "benign").iterdir())[section == "training" :]:
            path.unlink()
    cache = tmp_path / "features"
    preload(tmp_path, data, cache, **weights)
    assert len(list(cache.glob("*.safetensors"))) == len({path.read_bytes() for path in data.rglob("*.png")})
    for options in ({}, {"cache_dir": str(cache)}):
        FINE_GRAINED.run("train", tmp_path, data, **weights, **options)
        for section in ("training", "validation", "test"):
            flow = FINE_GRAINED.run("evaluate", tmp_path, data, eval_section=section, **options)
            assert all(math.isfinite(value) for value in metrics(flow).values())
    few = "2 images of each class were asked for, but there are 1 of benign"
    refusal(FINE_GRAINED, "train", tmp_path / "run", data, few, num_labelled=2, **weights)


@pytest.mark.slow
def test_two_processes_train_one_model_from_stored_features(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    bundle, weights, cache = FINE_GRAINED.copy(tmp_path), {"pretrained_path": str(checkpoint)}, tmp_path / "features"
    preload(tmp_path, images, cache, **weights)
    train_in_two_processes(FINE_GRAINED, bundle, images, **weights, cache_dir=cache)
    assert {path.name for path in files_below(bundle / "models")} == {"model.pt", "fpt_plus.safetensors"}
    flow = FINE_GRAINED.run("evaluate", bundle, images, **weights, cache_dir=str(cache))
    assert 0 <= metrics(flow)["val_balanced_accuracy"] <= 1


def test_class_weights_count_in_the_loss(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    scores, label = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    losses = {}
    for weights in (None, [1.0, 3.0]):
        flow = FINE_GRAINED.workflow("train", tmp_path, images, pretrained_path=str(checkpoint), class_weights=weights)
        losses[str(weights)] = float(parsed(flow, "loss")(scores, label))
    right, wrong = torch.nn.functional.cross_entropy(scores, label, reduction="none").tolist()
    assert losses["None"] == pytest.approx((right + wrong) / 2)
    assert losses["[1.0, 3.0]"] == pytest.approx((right + 3 * wrong) / 4)
