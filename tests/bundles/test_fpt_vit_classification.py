"""The FPT bundle: stored features, the same without, both variants, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow

from monai_petl import inspect_adapter
from tests.bundles.helpers import FINE_GRAINED, messages, parsed, refusal

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


def test_class_weights_count_in_the_loss(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    scores, label = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    losses = {}
    for weights in (None, [1.0, 3.0]):
        flow = FINE_GRAINED.workflow("train", tmp_path, images, pretrained_path=str(checkpoint), class_weights=weights)
        losses[str(weights)] = float(parsed(flow, "loss")(scores, label))
    right, wrong = torch.nn.functional.cross_entropy(scores, label, reduction="none").tolist()
    assert losses["None"] == pytest.approx((right + wrong) / 2)
    assert losses["[1.0, 3.0]"] == pytest.approx((right + 3 * wrong) / 4)
