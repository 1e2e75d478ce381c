"""The EPT bundle: one class an image or several, metrics, the published recipe, few shots, bad input."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from PIL import Image
from safetensors.torch import load_file

from monai_petl import inspect_adapter
from monai_petl.core.deltas import deltas_of
from monai_petl.methods import EPT
from tests.bundles.helpers import EMBEDDED_PROMPTS, REPOSITORY, parsed, refusal

FINDINGS = ["top", "bottom", "never"]
SEVERAL = {"class_names": FINDINGS, "multi_label": True}
LEARNING = {"epochs": 2, "epoch_length": 40, "lr": 0.02, "delta_lr": 0.05, "affine_prob": 0.0, "val_interval": 2}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are bright at the top, at the bottom, at both or on none; of the third finding only one has it."""
    root, random = tmp_path_factory.mktemp("findings") / "data", np.random.default_rng(0)
    root.mkdir()
    rows = [["file", "top", "bottom", "never", "split", "group"]]
    for section, count in (("training", 12), ("validation", 8), ("test", 8)):
        for n in range(count):
            top, bottom = n % 2, n // 2 % 2
            picture = random.integers(0, 60, (40, 48), np.uint8)
            picture[:20] += np.uint8(150 * top)
            picture[20:] += np.uint8(150 * bottom)
            name = f"{section}{n}.png"
            Image.fromarray(picture).save(root / name)
            rows.append([name, top, bottom, int(name == "training0.png"), section, f"{section} patient {n // 2}"])
    with (root / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def metrics(flow: ConfigWorkflow) -> dict[str, float]:
    return parsed(flow, "validate::evaluator").state.metrics


def rows_of(root: Path) -> list[dict[str, str]]:
    with (root / "eval" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_one_class_an_image(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    weights = {"pretrained_path": str(checkpoint)}
    flow = EMBEDDED_PROMPTS.run("train", tmp_path, images, **weights, **LEARNING)
    assert metrics(flow)["val_balanced_accuracy"] == 1.0
    assert metrics(flow)["val_map"] == 1.0
    network = parsed(flow, "adapted_network")
    start = math.log(17) - 22
    assert all((delta.logits - start).abs().max() > 0.5 for _, delta in deltas_of(network))  # 80 steps of up to 0.05
    adapter = tmp_path / "models" / "adapters" / "ept.safetensors"
    assert inspect_adapter(adapter)["methods"][0]["method"] == "EPT"
    files = {"adapter_path": str(adapter), "ckpt_path": str(tmp_path / "none.pt"), **weights}
    assert metrics(EMBEDDED_PROMPTS.run("evaluate", tmp_path, images, **files))["val_balanced_accuracy"] == 1.0
    EMBEDDED_PROMPTS.run("inference", tmp_path, images, **files)
    assert all(Path(row["file"]).parent.name == row["prediction"] for row in rows_of(tmp_path))


def test_features_are_measured_while_it_is_evaluated(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    EMBEDDED_PROMPTS.run("train", tmp_path, images, pretrained_path=str(checkpoint), method="head")
    page = (REPOSITORY / "docs" / "analysis.md").read_text(encoding="utf-8")
    (more := tmp_path / "features.json").write_text(
        re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0], encoding="utf-8"
    )
    files = [*EMBEDDED_PROMPTS.config_files(EMBEDDED_PROMPTS.path, "evaluate"), str(more)]
    settings = {**EMBEDDED_PROMPTS.settings["evaluate"], "bundle_root": str(tmp_path), "dataset_dir": str(images)}
    flow = ConfigWorkflow(files, logging_file=False, workflow_type="train", method="head", **settings)
    flow.initialize()
    flow.run()
    flow.finalize()
    found = json.loads((tmp_path / "eval" / "features.json").read_text(encoding="utf-8"))
    assert found["separation_fisher"] > 0
    assert 0 <= found["separation_centroid"] <= 1
    assert 0 <= found["calibration_error"] <= 1
    assert metrics(flow)["separation_fisher"] == pytest.approx(found["separation_fisher"])
    features = load_file(tmp_path / "eval" / "features.safetensors")
    assert features["features"].shape == (len(features["labels"]), 24)


def test_several_classes_an_image(tmp_path: Path, findings: Path, checkpoint: Path, caplog) -> None:
    weights = {"pretrained_path": str(checkpoint), **SEVERAL}
    flow = EMBEDDED_PROMPTS.run("train", tmp_path, findings, **weights, **{**LEARNING, "epoch_length": 150})
    assert metrics(flow)["val_map"] == 1.0
    assert metrics(flow)["val_auc"] == 1.0
    assert metrics(flow)["val_accuracy"] > 0.8
    assert parsed(flow, "validate::evaluator").state.key_metric_name == "val_map"
    assert "never has no positive or no negative case here and is left out of the mean" in caplog.text
    flow = EMBEDDED_PROMPTS.run("evaluate", tmp_path, findings, **SEVERAL, undefined_score=0.0, eval_section="test")
    assert metrics(flow)["val_map"] == pytest.approx(2 / 3)
    assert metrics(flow)["val_auc"] == 1.0
    EMBEDDED_PROMPTS.run("inference", tmp_path, findings, **SEVERAL)
    rows = rows_of(tmp_path)
    assert list(rows[0]) == ["file", "prediction", *FINDINGS]
    for row in rows:
        assert row["prediction"] == "|".join(name for name in FINDINGS if float(row[name]) > 0.5)
    assert {row["prediction"] for row in rows} >= {"top", "bottom", "top|bottom"}


def test_the_sum_over_classes_is_their_mean_times_their_number(
    tmp_path: Path, findings: Path, checkpoint: Path
) -> None:
    scores, labels = torch.randn(4, 3), torch.randint(0, 2, (4, 3)).float()
    found = []
    for flag in (False, True):
        flow = EMBEDDED_PROMPTS.workflow(
            "train", tmp_path, findings, **SEVERAL, pretrained_path=str(checkpoint), sum_over_classes=flag
        )
        found.append(float(parsed(flow, "loss")(scores, labels)))
    assert found[1] == pytest.approx(3 * found[0])


def test_the_published_recipe(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    configs = EMBEDDED_PROMPTS.path / "configs"
    small = {
        key: value for key, value in EMBEDDED_PROMPTS.settings["train"].items() if key not in ("epochs", "epoch_length")
    }
    flow = ConfigWorkflow(
        [str(configs / "train.json"), str(configs / "published.json")],
        logging_file=False,
        workflow_type="train",
        **{**small, "bundle_root": str(tmp_path), "dataset_dir": str(images), "pretrained_path": str(checkpoint)},
    )
    flow.initialize()
    trainer, optimizer = parsed(flow, "train::trainer"), parsed(flow, "optimizer")
    rates = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda _: rates.append(optimizer.param_groups[0]["lr"]))
    flow.run()
    assert len(rates) == 20
    assert rates[0] == pytest.approx(6e-4)
    assert rates[10] == pytest.approx(3e-4)
    assert rates[19] == pytest.approx(3.7e-6, rel=0.01)
    assert isinstance(optimizer, torch.optim.SGD)
    deltas = [delta for _, delta in deltas_of(parsed(flow, "adapted_network"))]
    assert all(delta.logits.shape == (17, 100) for delta in deltas)
    assert float(deltas[0].logits.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert deltas[0].form == EPT(form="literal").form


@pytest.mark.parametrize(
    ("method", "layers"),
    [(method, 0) for method in ("head", "last_blocks", "vpt", "lora", "bias", "ffn_adapter", "full")] + [("head", 3)],
)
def test_the_methods_it_is_compared_with_run_in_it(
    method: str, layers: int, tmp_path: Path, findings: Path, checkpoint: Path
) -> None:
    options = {"method": method, "head_layers": layers, "pretrained_path": str(checkpoint), **SEVERAL}
    flow = EMBEDDED_PROMPTS.run("train", tmp_path, findings, **options)
    assert 0 <= metrics(flow)["val_map"] <= 1


def test_bad_input_is_named(tmp_path: Path, images: Path, findings: Path, checkpoint: Path) -> None:
    weights = {"pretrained_path": str(checkpoint)}
    few = r"5 images of each class were asked for, but there are 4 of normal, 4 of benign, 4 of malignant"
    refusal(EMBEDDED_PROMPTS, "train", tmp_path / "run", images, few, **weights, num_labelled=5)
    refusal(
        EMBEDDED_PROMPTS, "train", tmp_path / "run", images, "none of the classes normal, benign", **weights,
        class_names=["normal", "benign"],
    )  # fmt: skip
    copy = shutil.copytree(images, tmp_path / "copies")
    shutil.copy(copy / "training" / "benign" / "benign_2.png", copy / "validation" / "benign" / "other.png")
    leak = r"training and validation share 1 images: .*other.png and .*benign_2.png \(the same content\)"
    refusal(EMBEDDED_PROMPTS, "train", tmp_path / "run", copy, leak, **weights)
    refusal(EMBEDDED_PROMPTS, "evaluate", tmp_path / "run", copy, leak, ckpt_path=str(checkpoint))
    (copy / "validation" / "benign" / "other.png").write_bytes(b"no image")
    refusal(EMBEDDED_PROMPTS, "train", tmp_path / "run", copy, r"other\.png cannot be read", **weights)
    odd = shutil.copytree(findings, tmp_path / "odd")
    text = (odd / "labels.csv").read_text(encoding="utf-8").replace("training3.png,1", "training3.png,2")
    (odd / "labels.csv").write_text(text, encoding="utf-8")
    refusal(
        EMBEDDED_PROMPTS,
        "train",
        tmp_path / "run",
        odd,
        "has '2' for the class 'top'; give 1 where",
        **weights,
        **SEVERAL,
    )
    few = "no class has images with it and without it among the 8 for validation"
    text = "\n".join(
        line.replace(",1,", ",0,").replace(",1,", ",0,") if "validation" in line else line for line in text.splitlines()
    )
    (odd / "labels.csv").write_text(text.replace("training3.png,2", "training3.png,1"), encoding="utf-8")
    refusal(EMBEDDED_PROMPTS, "train", tmp_path / "run", odd, few, **weights, **SEVERAL)
    one = {"class_names": ["top"], "multi_label": True}
    refusal(
        EMBEDDED_PROMPTS,
        "train",
        tmp_path / "run",
        findings,
        "name two classes, and leave multi_label",
        **weights,
        **one,
    )
    assert not (tmp_path / "run" / "models").exists()
