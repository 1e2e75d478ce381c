"""The SAN bundle: both modes, its ablation, methods in its backbone, and the file of its side network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow

from monai_petl import inspect_adapter
from monai_petl.networks import SAN
from tests.bundles.helpers import SIDE_ADAPTER, parsed, refusal, segmentations

LEARNING = {"epochs": 3, "epoch_length": 10, "val_interval": 3, "lr": 2e-3, "affine_prob": 0.0}


def key_metric(flow: ConfigWorkflow) -> float:
    return float(parsed(flow, "validate::evaluator").state.best_metric)


def losses_of(flow: ConfigWorkflow) -> list[float]:
    found: list[float] = []
    trainer = parsed(flow, "train::trainer")
    trainer.add_event_handler("ITERATION_COMPLETED", lambda engine: found.append(float(engine.state.output[0]["loss"])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"deep_supervision": False, "recognition": False}, {"mode": "matched", "lr": 5e-3}, {"method": "lora"}],
    ids=["default", "masks alone", "matched", "lora in the backbone"],
)
def test_it_trains_and_is_evaluated(options: dict, tmp_path: Path, data: Path, checkpoint: Path) -> None:
    settings = {**LEARNING, **options, "pretrained_path": str(checkpoint)}
    flow = SIDE_ADAPTER.workflow("train", tmp_path, data, **settings)
    flow.initialize()
    losses = losses_of(flow)
    flow.run()
    flow.finalize()
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    adapter = tmp_path / "models" / "adapters" / f"{options.get('method', 'head')}.safetensors"
    header = inspect_adapter(adapter)
    assert header["notes"]["mode"] == options.get("mode", "class_queries")
    best = key_metric(flow)
    kept = {name: options[name] for name in ("mode", "recognition", "method") if name in options}
    again = SIDE_ADAPTER.run("evaluate", tmp_path, data, **kept)
    assert key_metric(again) == pytest.approx(best, abs=1e-4)
    again = SIDE_ADAPTER.run(
        "evaluate",
        tmp_path,
        data,
        **kept,
        pretrained_path=str(checkpoint),
        adapter_path=str(adapter),
        ckpt_path=str(tmp_path / "none"),
    )
    assert key_metric(again) == pytest.approx(best, abs=1e-4)


def test_the_backbone_is_that_of_the_checkpoint(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    before = SIDE_ADAPTER.workflow("train", tmp_path / "other", data, pretrained_path=str(checkpoint))
    before.initialize()
    flow = SIDE_ADAPTER.run("train", tmp_path, data, pretrained_path=str(checkpoint))
    network: SAN = parsed(flow, "adapted_network")
    wanted = parsed(before, "adapted_network").backbone.state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in network.backbone.state_dict().items())
    side = parsed(before, "adapted_network").side.state_dict()
    assert not torch.equal(side["heads.bias.last.weight"], network.side.heads.bias.last.weight)


def test_inference_of_the_matched_mode_writes_label_maps(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    SIDE_ADAPTER.run("train", tmp_path, data, pretrained_path=str(checkpoint), mode="matched", epochs=1)
    SIDE_ADAPTER.run("inference", tmp_path, data, mode="matched")
    found = segmentations(tmp_path / "eval")
    assert len(found) == len(json.loads((data / "dataset.json").read_text(encoding="utf-8"))["test"])
    assert all(set(image.get_fdata().astype(int).ravel()) <= set(range(5)) for image in found.values())


def test_settings_that_do_not_fit_are_named(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    given = {"pretrained_path": str(checkpoint)}
    for options, message in (
        ({"num_layers": 6}, "must be a multiple of 4; this one has 6"),
        ({"patch_size": [36, 32, 4]}, r"patches of \(8, 8, 2\) do not divide an image of \(36, 32, 4\)"),
        ({"mode": "matched", "recognition": False}, "mode='matched' needs recognition"),
        ({"method": "vpt"}, "VPT cannot add tokens"),
    ):
        refusal(SIDE_ADAPTER, "train", tmp_path / "run", data, message, **given, **options)
