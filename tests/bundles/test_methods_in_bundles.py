"""The bundles of methods at work on phantoms: training, evaluation, inference, any method by its name, several processes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_petl import inspect_adapter
from monai_petl.core.records import adapters_of
from monai_petl.core.roles import matches, unused_parameters
from tests.bundles.helpers import (
    AIM,
    BUNDLES,
    CLASSIFIERS,
    LORA,
    VPETL,
    Bundle,
    Trained,
    command,
    parsed,
    segmentations,
    state_in,
)
from tests.conftest import differing, state_of
from tests.marks import slow_unless

DEFAULTS = {LORA.name: "lora", VPETL.name: "vpetl", AIM.name: "aim"}
OTHERS = [
    (LORA, "full", {}),
    (LORA, "scratch", {}),
    (LORA, "head", {}),
    (LORA, "bias", {}),
    (LORA, "vpt", {}),
    (LORA, "lora", {"rank": 2, "dora": True, "targets": ["attention", "conv"]}),
    (VPETL, "ssf", {}),
    (VPETL, "vpetl", {"targets": "qkv", "ffn_bottleneck": None}),
    (AIM, "lora", {}),
    (AIM, "last_blocks", {"blocks": 2}),
    (AIM, "full", {}),
    (AIM, "aim", {"num_temporal_adapters": 2, "spatial": False}),
]


def listed(bundle: Bundle) -> list[str]:
    """The methods in the table of the bundle's card."""
    card = (bundle.path / "docs" / "README.md").read_text(encoding="utf-8")
    section = card.split("\n## Network and method\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)


LISTED = [(bundle, method) for bundle in BUNDLES for method in listed(bundle)]
MOVES = {  # what a method trains besides the head, by names
    "lora": r"\.deltas\.lora_",
    "vpetl": r"\.deltas\.(patt|ffn)_",
    "aim": r"\.deltas\.((temporal|spatial|joint)_adapter|slice)_|^backbone\.norm\.",
    "ffn_adapter": r"\.deltas\.ffn_",
    "vpt": r"(^|\.)deltas\.vpt_",
    "ept": r"(^|\.)deltas\.ept_",
    "ssf": r"(^|\.)deltas\.ssf_",
    "bias": r"(^|[._])bias$",
    "norm": r"norm",
    "last_blocks": r"blocks\.\d+\.|norm",
    "head": r"(?!)",
    "full": r"",
    "scratch": r"",
}


@pytest.mark.parametrize(("bundle", "method"), LISTED, ids=[f"{bundle.name}-{method}" for bundle, method in LISTED])
def test_every_method_of_a_card_trains_what_it_says_and_nothing_else(
    bundle: Bundle, method: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = str(request.getfixturevalue(bundle.source))
    flow = bundle.workflow("train", tmp_path, tmp_path, method=method, pretrained_path=source)
    network, optimizer = parsed(flow, "network").cpu().train(), parsed(flow, "optimizer")
    before, x = state_of(network), torch.randn(2 if bundle in CLASSIFIERS else 1, *bundle.input_shape[1:])
    for _ in range(2):  # what lies behind a factor of zeros moves in the second
        optimizer.zero_grad()
        loss = sum(t.square().mean() for t in tensors_in(network(x)))
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    own = {name for record in adapters_of(network).values() for name in record.tensors}  # with running statistics
    moved = differing(before, network.state_dict())
    assert moved <= own
    assert all(".relative_" in name for name in trained - moved)  # PUNet's deepest windows have one voxel at this size
    if bundle.name.startswith(("punet", "fpt")):  # whose methods have names of their own, and no head apart
        assert trained
        return
    head = bundle.config("train")["also_train"]
    beside = {name for name in trained if not any(matches(name, pattern) for pattern in head)}
    assert bool(beside) == (method != "head")
    assert trained - beside
    assert all(re.search(MOVES[method], name) for name in beside), beside
    if method in ("full", "scratch"):
        assert trained == {name for name, _ in network.named_parameters()} - unused_parameters(network)


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of what a network returns."""
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [output] if isinstance(output, Tensor) else [tensor for part in parts for tensor in tensors_in(part)]


@pytest.fixture(params=[LORA, VPETL, AIM], ids=lambda bundle: bundle.name)
def each(request: pytest.FixtureRequest) -> Bundle:
    return request.param


def key_metric(flow: Any) -> float:
    return parsed(flow, "validate::evaluator").state.metrics["val_mean_dice"]


def best_metric(flow: Any) -> float:
    return parsed(flow, "validate::evaluator").state.best_metric


def adapter_of(trained: Trained, bundle: Bundle) -> Path:
    return trained.bundle / "models" / "adapters" / f"{DEFAULTS[bundle.name]}.safetensors"


def test_evaluation_finds_what_validation_found_by_the_model_and_by_the_adapter(
    each: Bundle, trained: Trained, weights: dict[str, str], data: Path, tmp_path: Path
) -> None:
    best = best_metric(trained.workflow)
    for files in ({}, {"adapter_path": str(adapter_of(trained, each)), "ckpt_path": str(tmp_path / "none.pt")}):
        assert key_metric(each.run("evaluate", tmp_path, data, **{**weights, **files})) == pytest.approx(best, abs=1e-4)


def test_inference_by_the_model_and_by_the_adapter_writes_the_same_label_maps(
    each: Bundle, trained: Trained, weights: dict[str, str], data: Path, tmp_path: Path
) -> None:
    each.run("inference", tmp_path / "model", data, **weights)
    each.run("inference", tmp_path / "adapter", data, **weights, adapter_path=str(adapter_of(trained, each)))
    by_model, by_adapter = (segmentations(tmp_path / name / "eval") for name in ("model", "adapter"))
    assert len(by_model) == 2
    for name, label in by_model.items():
        assert np.array_equal(np.asarray(label.dataobj), np.asarray(by_adapter[name].dataobj)), name
        assert np.asarray(label.dataobj).max() <= 4


def test_the_backbone_is_that_of_the_file_bit_for_bit_after_training(
    each: Bundle, trained: Trained, data: Path, tmp_path: Path, weights: dict[str, str]
) -> None:
    state = state_in(trained.model)
    untouched = each.workflow("train", tmp_path, data, **weights, also_train=[], method="head")
    source = parsed(untouched, "adapted_network").state_dict()
    own = inspect_adapter(adapter_of(trained, each))["shapes"]
    frozen = [name for name in source if name not in own and not name.startswith(("decoder", "encoder", "out"))]
    assert len(frozen) > 20
    for name in frozen:
        assert torch.equal(source[name], state[name]), name


@pytest.mark.parametrize(
    ("bundle", "method", "options"),
    slow_unless(lambda bundle, method, options: "vit" in bundle.name, OTHERS),
    ids=[f"{bundle.name}-{method}" for bundle, method, _ in OTHERS],
)
def test_other_methods_and_options_run_in_the_same_bundle(
    bundle: Bundle, method: str, options: dict[str, Any], data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = str(request.getfixturevalue(bundle.source))
    settings = {"pretrained_path": source, "method": method, "method_options": options}
    flow = bundle.run("train", tmp_path, data, **settings, epochs=1)
    again = bundle.run("evaluate", tmp_path, data, **settings)
    assert key_metric(again) == pytest.approx(best_metric(flow), abs=1e-4)
    adapter = tmp_path / "models" / "adapters" / f"{method}.safetensors"
    assert inspect_adapter(adapter)["notes"]["method"] == method


def test_a_lora_of_the_convolutions_is_small_beside_the_network(
    data: Path, tmp_path: Path, swin_checkpoint: Path
) -> None:
    """The output convolution and factors everywhere, as for a backbone that was trained to segment."""
    options = {"also_train": ["out"], "method_options": {"rank": 1, "targets": ["q", "v", "all-conv"]}}
    with pytest.warns(UserWarning, match="saves nothing in"):
        LORA.run("train", tmp_path, data, pretrained_path=str(swin_checkpoint), epochs=1, **options)
    adapter = tmp_path / "models" / "adapters" / "lora.safetensors"
    shapes = inspect_adapter(adapter)["shapes"]
    assert any(".conv.lora_A" in name for name in shapes)
    values = sum(int(np.prod(shape)) for shape in shapes.values())
    assert values < 0.05 * sum(tensor.numel() for tensor in state_in(tmp_path / "models" / "model.pt").values())


def test_a_transformer_without_its_decoder_is_loaded_and_a_frozen_random_decoder_is_warned_of(
    data: Path, tmp_path: Path, swin_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {n: t for n, t in state_in(swin_checkpoint).items() if n.startswith("swinViT.")}
    published = {f"module.{n.removeprefix('swinViT.')}".replace("mlp.linear", "mlp.fc"): t for n, t in state.items()}
    torch.save({"state_dict": published, "epoch": 3}, tmp_path / "ssl.pt")
    flow = LORA.workflow("train", tmp_path, data, pretrained_path=str(tmp_path / "ssl.pt"), also_train=["out"])
    network = parsed(flow, "adapted_network")
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in state.items())
    assert "holds the transformer alone" in caplog.text


def test_a_file_of_another_network_is_refused_with_its_tensors(
    data: Path, tmp_path: Path, swin_checkpoint: Path
) -> None:
    flow = LORA.workflow("train", tmp_path, data, pretrained_path=str(swin_checkpoint), feature_size=24)
    with pytest.raises(RuntimeError) as error:
        parsed(flow, "adapted_network")
    assert "does not fit this SwinUNETR" in str(error.value.__cause__)


@pytest.mark.slow
def test_two_processes_train_one_adapter(tmp_path: Path, data: Path, swin_checkpoint: Path) -> None:
    bundle = LORA.copy(tmp_path)
    files = [str(bundle / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train")]
    settings = {**LORA.settings["train"], "epochs": 1, "pretrained_path": swin_checkpoint, "num_workers": 0}
    settings |= {"bundle_root": bundle, "dataset_dir": data, "config_file": files}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    done = subprocess.run(
        command(*words, **settings),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert inspect_adapter(bundle / "models" / "adapters" / "lora.safetensors")["values"] > 0
