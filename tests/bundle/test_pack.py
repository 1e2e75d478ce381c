from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigWorkflow
from safetensors.torch import save_file

from monai_petl.bundle import BundleFolder
from monai_petl.bundle.pack import pack
from monai_petl.bundle.toy_data import make_toy_volumes
from tests.bundle.test_new_class import shrink
from tests.bundles.helpers import INFLATED, PUNET, REPOSITORY, checkpoint_state, state_in

URL = "https://example.org/weights"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle after a training from a backbone in its own models folder."""
    folder = tmp_path_factory.mktemp("trained")
    root = shrink(INFLATED, folder)
    (root / "models").mkdir()
    save_file(checkpoint_state(), root / "models" / "pretrained.safetensors")
    bundle = BundleFolder(root)
    bundle.run("train", make_toy_volumes(folder / "data", bundle.class_names))
    return root


def unpacked(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    (root,) = folder.iterdir()
    return root


@pytest.mark.parametrize(
    "place", ["docs/notes.txt", "docs/figures/deep.png", "docs/folder", "configs/more.json", "LICENSE"]
)
def test_a_link_that_leaves_the_bundle_is_refused_and_named(tmp_path: Path, place: str) -> None:
    root, secret = shrink(INFLATED, tmp_path), tmp_path / "patients" / "names.txt"
    secret.parent.mkdir()
    secret.write_text("a name", encoding="utf-8")
    link = root / place
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret.parent if place == "docs/folder" else secret)
    with pytest.raises(
        ValueError, match=rf"links that leave its folder: {place} -> {secret.parent}.*Copy what is meant"
    ):
        pack(root, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()
    link.unlink()
    inside = root / "docs" / "README.md"
    link.symlink_to(inside)
    if place != "configs/more.json":
        assert place in pack(root, tmp_path / "out", check=False).files


def test_an_adapter_goes_without_its_backbone_and_one_command_rebuilds_the_network(
    trained: Path, tmp_path: Path
) -> None:
    packed = pack(trained, tmp_path, URL, "models/adapters/head.safetensors")
    assert packed.path.name == "inflated_vit_segmentation_v0.1.1.zip"
    assert "models/adapters/head.safetensors" in packed.files
    assert not {"models/model.pt", "models/pretrained.safetensors"} & packed.files.keys()
    root = unpacked(packed.path, tmp_path / "elsewhere")
    backbone = trained / "models" / "pretrained.safetensors"
    digest = hashlib.sha256(backbone.read_bytes()).hexdigest()
    entry = {
        "path": "models/pretrained.safetensors",
        "url": f"{URL}/pretrained.safetensors",
        "hash_val": digest,
        "hash_type": "sha256",
    }
    assert yaml.safe_load((root / "large_files.yml").read_text(encoding="utf-8")) == {"large_files": [entry]}
    (root / "models" / "pretrained.safetensors").write_bytes(backbone.read_bytes())  # what downloading does
    words = packed.rebuild.split()
    assert words[:5] == ["python", "-m", "monai.bundle", "run", "rebuild"]
    options = dict(zip(words[5::2], words[6::2], strict=True))
    flow = ConfigWorkflow(
        str(root / options["--config_file"]),
        logging_file=False,
        workflow_type="infer",
        run_id="rebuild",
        bundle_root=str(root),
        adapter_path=str(root / options["--adapter_path"]),
    )
    flow.initialize()
    flow.run()
    made, kept = (state_in(folder / "models" / "model.pt") for folder in (root, trained))
    assert list(made) == list(kept)
    assert all(torch.equal(made[name], kept[name]) for name in kept)


def test_the_network_itself_is_packed_where_it_is_small(trained: Path, tmp_path: Path) -> None:
    packed = pack(trained, tmp_path)
    root = unpacked(packed.path, tmp_path / "elsewhere")
    assert packed.rebuild == ""
    assert packed.large == ()
    assert (root / "models" / "model.pt").read_bytes() == (trained / "models" / "model.pt").read_bytes()
    assert not {"eval", "data", "large_files.yml"} & {path.name for path in root.iterdir()}


def test_the_unit_test_for_the_zoo_runs_on_the_unpacked_bundle(trained: Path, tmp_path: Path) -> None:
    packed = pack(trained, tmp_path / "zoo")
    (tmp_path / "models").mkdir()
    unpacked(packed.path, tmp_path / "unzipped").rename(tmp_path / "models" / trained.name)
    words = [sys.executable, "-m", "unittest", "discover", "-s", "zoo", "-p", packed.test.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    start = time.perf_counter()
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Ran 1 test" in done.stderr
    assert time.perf_counter() - start < 60
    (tmp_path / "models" / trained.name / "configs" / "evaluate.json").unlink()
    again = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert again.returncode != 0


def test_the_same_bundle_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    first = pack(trained, tmp_path / "a")
    for path in trained.rglob("*"):
        os.utime(path, (10**9, 10**9))
    assert pack(trained, tmp_path / "b").sha256 == first.sha256
    assert hashlib.sha256(first.path.read_bytes()).hexdigest() == first.sha256


def test_a_network_above_the_zoos_limit_is_an_entry(tmp_path: Path) -> None:
    root = shrink(PUNET, tmp_path / "source")
    (root / "models").mkdir()
    torch.save({"large": torch.zeros(7_000_000)}, root / "models" / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt \(28,\d+,\d+ bytes\) does not go into the zip.*url"):
        pack(root, tmp_path)
    packed = pack(root, tmp_path, URL)
    assert [entry["path"] for entry in packed.large] == ["models/model.pt"]
    assert "models/model.pt" not in packed.files


def test_an_adapter_of_another_training_is_refused(trained: Path, tmp_path: Path) -> None:
    state = state_in(trained / "models" / "model.pt")
    torch.save({name: tensor + 1 for name, tensor in state.items()}, trained / "models" / "model.pt")
    try:
        with pytest.raises(ValueError, match=r"is not the network in models/model\.pt: \d+ tensors differ"):
            pack(trained, tmp_path, URL, "models/adapters/head.safetensors")
    finally:
        torch.save(state, trained / "models" / "model.pt")
    assert not list(tmp_path.glob("*.zip"))


def test_bad_input_is_named_and_nothing_is_written(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no adapter"):
        pack(trained, tmp_path, URL, "models/adapters/none.safetensors")
    with pytest.raises(ValueError, match="where it can be downloaded"):
        pack(trained, tmp_path, None, "models/adapters/head.safetensors")
    outside = tmp_path / "a.safetensors"
    outside.write_bytes((trained / "models" / "adapters" / "head.safetensors").read_bytes())
    with pytest.raises(ValueError, match="is not below"):
        pack(trained, tmp_path, URL, outside)
    root = INFLATED.copy(tmp_path / "copy")
    (root / "models" / "adapters").mkdir(parents=True)
    (root / "models" / "adapters" / "a.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="no backbone"):
        pack(root, tmp_path, URL, "models/adapters/a.safetensors")
    (root / "models" / "pretrained.safetensors").symlink_to(trained / "models" / "pretrained.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors does not fit the backbone"):
        pack(root, tmp_path, URL, "models/adapters/a.safetensors")
    with pytest.raises(ValueError, match="lies in the bundle"):
        pack(root, root / "docs")
    punet = PUNET.copy(tmp_path / "punet")
    (punet / "models").mkdir()
    (punet / "models" / "a.safetensors").touch()
    with pytest.raises(ValueError, match=r"punet_ct_segmentation keeps all .*without adapter"):
        pack(punet, tmp_path, URL, "models/a.safetensors")
    (root / "LICENSE").unlink()
    with pytest.raises(ValueError, match="does not pass the check of its files: missing: LICENSE"):
        pack(root, tmp_path)
    assert not list(tmp_path.glob("*.zip"))


def test_entries_stay_and_what_editors_leave_behind_does_not_come_along(tmp_path: Path) -> None:
    root = INFLATED.copy(tmp_path / "source")
    entry = {"path": "models/model.pt", "url": f"{URL}/model.pt", "hash_val": "0" * 64, "hash_type": "sha256"}
    (root / "large_files.yml").write_text(yaml.safe_dump({"large_files": [entry]}), encoding="utf-8")
    for name in (".DS_Store", "docs/.ipynb_checkpoints/a.md", "mlruns/a", "configs/.DS_Store"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    packed = pack(root, tmp_path)
    assert packed.large == (entry,)
    assert not [name for name in packed.files if "/." in f"/{name}" or "mlruns" in name]
    (root / "large_files.yml").unlink()
    assert "holds no weights" in str(pack(root, tmp_path))


def test_an_adapter_above_the_zoos_limit_is_an_entry_too(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_petl.bundle.pack.LARGEST", 1000)
    packed = pack(trained, tmp_path, URL, "models/adapters/head.safetensors")
    named = {entry["path"] for entry in packed.large}
    assert {"models/pretrained.safetensors", "models/adapters/head.safetensors"} <= named
    assert "models/adapters/head.safetensors" not in packed.files


def test_what_is_packed_can_be_read_as_json(trained: Path, tmp_path: Path) -> None:
    root = unpacked(pack(trained, tmp_path).path, tmp_path / "elsewhere")
    assert json.loads((root / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"] == "0.1.1"
