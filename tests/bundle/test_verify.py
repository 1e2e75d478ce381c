"""A wrong bundle fails the check that is for it. That every bundle of the repository passes all is in tests/bundles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from monai_petl.bundle.verify import CHECKS, verify
from tests.bundles.helpers import INFLATED, PUNET, REPOSITORY
from tests.marks import slow_unless

SCHEMA = REPOSITORY / "tests" / "schemas" / "meta_schema_20240725.json"
OF_FILES = tuple(name for name in CHECKS[: CHECKS.index("network")])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return INFLATED.copy(tmp_path)


def edit(root: Path, config: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "configs" / f"{config}.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    change(contents)
    path.write_text(json.dumps(contents, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def large(root: Path, digest: str = "0" * 64, **more: str) -> None:
    (root / "models").mkdir()
    (root / "models" / "pretrained.safetensors").write_bytes(b"weights")
    entry = {"path": "models/pretrained.safetensors", "url": "https://example.org/a", "hash_val": digest, **more}
    (root / "large_files.yml").write_text(json.dumps({"large_files": [entry]}), encoding="utf-8")


def with_model(root: Path, name: str, contents: Any) -> None:
    (root / "models").mkdir(exist_ok=True)
    torch.save(contents, root / "models" / name)


def pred(contents: dict[str, Any]) -> dict[str, Any]:
    return contents["network_data_format"]["outputs"]["pred"]


def rewrite_card(root: Path, old: str, new: str) -> None:
    path = root / "docs" / "README.md"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


CONSTANT = {"_target_": "torch.optim.lr_scheduler.ConstantLR", "optimizer": "@optimizer"}
STILL = {"lr": 0.0, "delta_lr": 0.0, "backbone_lr": 0.0, "lr_scheduler": CONSTANT}
WRONG: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "no licence": ("files", "LICENSE", lambda root: (root / "LICENSE").unlink()),
    "scripts": ("files", "scripts", lambda root: (root / "scripts").mkdir()),
    "tabs": (
        "form of JSON",
        "train.json",
        lambda root: (root / "configs" / "train.json").write_text('{\n\t"a": 1\n}\n', encoding="utf-8"),
    ),
    "key twice": (
        "form of JSON",
        "stands twice",
        lambda root: (root / "configs" / "evaluate.json").write_text(
            '{\n    "a": 1,\n    "a": 1\n}\n', encoding="utf-8"
        ),
    ),
    "channels": (
        "metadata",
        "7 channels",
        lambda root: edit(root, "metadata", lambda c: pred(c).update(num_channels=7)),
    ),
    "upper case": (
        "metadata",
        "lower case",
        lambda root: [
            edit(root, "metadata", lambda c: pred(c)["channel_def"].update({"1": "Liver"})),
            edit(root, "inference", lambda c: c["class_names"].__setitem__(0, "Liver")),
        ],
    ),
    "version not in changelog": (
        "metadata",
        "changelog",
        lambda root: edit(root, "metadata", lambda c: c.update(version="9.9.9")),
    ),
    "no intended use": (
        "metadata",
        "intended_use",
        lambda root: edit(root, "metadata", lambda c: c.pop("intended_use")),
    ),
    "schema": ("schema", "task", lambda root: edit(root, "metadata", lambda c: c.pop("task"))),
    "stale pin": (
        "versions",
        "monai 1.3.0",
        lambda root: edit(root, "metadata", lambda c: c.update(monai_version="1.3.0")),
    ),
    "range": (
        "versions",
        "not exact",
        lambda root: edit(root, "metadata", lambda c: c["required_packages_version"].update(einops=">=0.8")),
    ),
    "absolute path": (
        "portability",
        "absolute path",
        lambda root: edit(root, "train", lambda c: c.update(dataset_dir="/data/spleen")),
    ),
    "loader": (
        "portability",
        "map_location",
        lambda root: edit(root, "train", lambda c: c["train"]["handlers"][-1].update(map_location="cuda")),
    ),
    "numbered device": (
        "portability",
        "numbered device",
        lambda root: edit(root, "inference", lambda c: c.update(device="cuda:0")),
    ),
    "unknown package": (
        "portability",
        "mypackage",
        lambda root: edit(root, "train", lambda c: c["loss"].update(_target_="mypackage.Loss")),
    ),
    "no property": ("ids", "inferer", lambda root: edit(root, "inference", lambda c: c.pop("inferer"))),
    "not referred to": (
        "ids",
        "train::trainer::train_handlers",
        lambda root: edit(root, "train", lambda c: c["train"]["trainer"].update(train_handlers=[])),
    ),
    "other network": (
        "agreement",
        "num_heads",
        lambda root: edit(root, "inference", lambda c: c.update(num_heads=3)),
    ),
    "other preprocessing": (
        "agreement",
        "prepares images otherwise",
        lambda root: edit(root, "inference", lambda c: c["preprocessing"]["transforms"].pop(3)),
    ),
    "other spacing": (
        "agreement",
        "spacing",
        lambda root: edit(root, "inference", lambda c: c.update(spacing=[1.0, 1.0, 1.0])),
    ),
    "other order of classes": (
        "agreement",
        "mistaken",
        lambda root: edit(root, "train", lambda c: c["class_names"].reverse()),
    ),
    "no list": ("weights", "large_files", lambda root: (root / "large_files.yml").write_text("", encoding="utf-8")),
    "unknown package version": (
        "versions",
        "nothing is installed",
        lambda root: edit(root, "metadata", lambda c: c["required_packages_version"].update({"foo-bar": "1.0.0"})),
    ),
    "repetition": (
        "overrides",
        "seed",
        lambda root: edit(root, "evaluate", lambda c: c.update(seed=1234)),
    ),
    "second network": ("weights", "lora.pt", lambda root: with_model(root, "lora.pt", {"a": torch.zeros(1)})),
    "nested network": ("weights", "flat", lambda root: with_model(root, "model.pt", {"epoch": 1, "state": {}})),
    "network below a key": (
        "weights",
        "flat",
        lambda root: with_model(root, "model.pt", {"model": {"a": torch.zeros(1)}}),
    ),
    "hash": ("weights", "hash", lambda root: large(root, hash_type="sha256")),
    "kind of hash": ("weights", "sha256", lambda root: large(root, hash_type="md5")),
    "id that nothing reads": (
        "model card",
        "nothing reads: idle",
        lambda root: [
            edit(root, "train", lambda c: c.update(idle=1)),
            rewrite_card(root, "| --- | --- | --- |\n", "| --- | --- | --- |\n| `idle` | 1 | |\n"),
        ],
    ),
    "unknown id in the card": (
        "model card",
        "no_such_id",
        lambda root: rewrite_card(root, "| --- | --- | --- |\n", "| --- | --- | --- |\n| `no_such_id` | 1 | |\n"),
    ),
}


def test_a_bundle_of_the_repository_passes_the_checks_of_its_files(root: Path) -> None:
    found = verify(root, SCHEMA, OF_FILES)
    assert found.ok, str(found)
    assert all(check.status == "passed" for check in found.found)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_bundle_fails_the_check_that_is_for_it(name: str, root: Path) -> None:
    check, word, spoil = WRONG[name]
    spoil(root)
    found = verify(root, SCHEMA, OF_FILES)
    assert found[check].status == "failed", str(found)
    assert word in found[check].detail


def test_the_name_says_the_task(root: Path) -> None:
    moved = root.rename(root.with_name("inflated_vit"))
    assert "_segmentation or _classification" in verify(moved, None, ("files",))["files"].detail


def without_inversion(contents: dict[str, Any]) -> None:
    contents["postprocessing"]["transforms"] = contents["postprocessing"]["transforms"][1:]


RUNS_WRONG: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "channels": (
        "network",
        "",
        lambda root: edit(root, "metadata", lambda c: pred(c).update(num_channels=7)),
    ),
    "other tensors": ("network", "model.pt", lambda root: with_model(root, "model.pt", {"a": torch.zeros(1)})),
    "evaluation without weights": (
        "evaluate",
        "other weights",
        lambda root: edit(root, "evaluate", lambda c: c.update({"adapted_network::path": None})),
    ),
    "grid": ("infer", "grid", lambda root: edit(root, "inference", without_inversion)),
    "silent": (
        "what is missing",
        "",
        lambda root: edit(root, "inference", lambda c: c.update(run=["$@check_data", "$@evaluator.run()"])),
    ),
    "claim": (
        "TorchScript scripted",
        "the card says yes",
        lambda root: rewrite_card(root, "| TorchScript, scripted | no |", "| TorchScript, scripted | yes |"),
    ),
    "claims the less": (
        "torch.export",
        "the card does not say so",
        lambda root: rewrite_card(root, "| `torch.export` | yes |", "| `torch.export` | no |"),
    ),
    "claims less of ONNX": (
        "ONNX",
        "the card does not say so",
        lambda root: rewrite_card(root, "| ONNX | yes |", "| ONNX | no |"),
    ),
    "nothing learnt": ("train", "changed nothing", lambda root: edit(root, "train", lambda c: c.update(STILL))),
    "no number": ("train", "the loss is nan in epoch 1", lambda root: edit(root, "train", lambda c: c.update(lr=1e30))),
    "silent about the package": (
        "without monai_petl",
        "verify_net_in_out",
        lambda root: edit(root, "inference", lambda c: c["network_def"].pop("_requires_")),
    ),
    "no version of MONAI": (
        "properties",
        "monai_version",
        lambda root: edit(root, "metadata", lambda c: c.pop("monai_version")),
    ),
    "one process": (
        "2 processes",
        "torchrun ended with 1",
        lambda root: edit(root, "multi_gpu_train", lambda c: c.update(device="cuda:99")),
    ),
    "reads what is not packed": (
        "archive",
        "adapters",
        lambda root: edit(
            root,
            "inference",
            lambda c: c["initialize"].append("$os.listdir(@bundle_root + '/models/adapters')"),
        ),
    ),
}


PROCESSES = ("one process", "silent about the package")  # which start Python anew


@pytest.mark.parametrize("name", slow_unless(lambda name: name not in PROCESSES, RUNS_WRONG))
def test_a_bundle_that_runs_wrongly_fails_the_check_that_is_for_it(name: str, root: Path) -> None:
    check, word, spoil = RUNS_WRONG[name]
    spoil(root)
    found = verify(root, None, (check,))
    assert found[check].status == "failed", str(found)
    assert word in found[check].detail


def test_the_folder_and_the_process_stay_as_they_were(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    here, state = Path.cwd(), torch.random.get_rng_state()
    verify(root, None, ("files", "train", "infer"))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert Path.cwd() == here
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_cannot_be_checked_is_skipped_with_its_reason(root: Path) -> None:
    found = verify(root, None, ("schema", "TorchScript scripted"))
    assert [check.status for check in found.found] == ["skipped", "skipped"]
    assert "--schema" in found["schema"].detail
    assert found.ok


def test_what_is_no_bundle_and_no_check_is_named(tmp_path: Path, root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no configs/metadata\.json"):
        verify(tmp_path)
    with pytest.raises(ValueError, match="'nonsense'; there are: files, "):
        verify(root, None, ("nonsense",))
    with pytest.raises(FileNotFoundError, match="no schema"):
        verify(root, tmp_path / "none.json")


def test_a_training_that_fails_is_not_made_again_by_every_check(root: Path) -> None:
    edit(root, "train", lambda c: c.update(segmentation_loss="none"))
    found = verify(root, None, ("train", "evaluate", "infer"))
    assert [check.status for check in found.found] == ["failed", "skipped", "skipped"]
    assert "segmentation_loss must be one of" in found["train"].detail
    assert found["infer"].detail == "the training failed"


def test_a_bundle_without_small_sizes_can_be_checked(tmp_path: Path) -> None:
    root = PUNET.copy(tmp_path)
    (root / "configs" / "small.json").unlink()
    found = verify(root, SCHEMA, OF_FILES)
    assert {check.check: check.detail for check in found.found if check.status == "failed"} == {
        "model card": "the card names files that are not there: configs/small.json"
    }
