"""Files of ``torch.save``: whole or not at all, and refused when they were cut off, changed, inflated or hold code."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from monai_petl.bundle.checks import CheckError, check_weights
from monai_petl.bundle.folder import BundleFolder
from monai_petl.files.torch_files import read_torch, write_state
from monai_petl.handlers import require_checkpoint
from monai_petl.weights.inflation.files import read_checkpoint
from monai_petl.weights.state_files import read_state_dict, save_network

STATE = {"a": torch.arange(10_000.0), "b": torch.ones(3, 4)}
READERS = {
    "state dict": lambda path: read_state_dict(path, ""),
    "inflation": read_checkpoint,
    "checkpoint": require_checkpoint,
}


def compressed(path: Path) -> None:
    """200 kB that become 200 MB."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(50_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
def test_a_value_that_was_changed_is_refused(tmp_path, reader, place):
    path = write_state(tmp_path / "model.pt", STATE, "the network")
    READERS[reader](path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True).keys() == STATE.keys()  # torch itself says nothing
    with pytest.raises(ValueError, match=rf"{path} is damaged: "):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_would_fill_the_memory_is_refused(tmp_path, reader):
    compressed(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt (has 0\.2 MiB and would take 191 MiB|is damaged)"):
        READERS[reader](tmp_path / "model.pt")


@pytest.mark.parametrize("reader", ["state dict", "inflation"])
def test_tensors_that_repeat_one_value_are_refused(tmp_path, reader):
    torch.save({"a": torch.zeros(1).expand(10**10)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"would take 38,147 MiB of memory: its tensors repeat values"):
        READERS[reader](tmp_path / "model.pt")


def test_tied_weights_and_files_of_older_torch_are_read(tmp_path):
    weight = torch.randn(100, 100)
    torch.save({"a": weight, "b": weight, "c": weight[:50]}, tmp_path / "tied.pt")
    assert torch.equal(read_torch(tmp_path / "tied.pt")["b"], weight)
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_torch(tmp_path / "old.pt")["a"], STATE["a"])


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x05\x06" + b"\0" * 18, pickle.dumps(Path("x"))])
def test_what_is_no_state_dict_is_one_sentence_without_the_advice_to_run_it(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    for reader in ("state dict", "inflation"):
        with pytest.raises(ValueError, match=r"model\.pt") as error:
            READERS[reader](tmp_path / "model.pt")
        assert len(str(error.value).splitlines()) == 1
        assert "weights_only" not in str(error.value)


def test_the_check_of_a_bundle_gives_no_advice_to_run_code(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text("{}", encoding="utf-8")
    torch.save({"a": Path("x")}, tmp_path / "models" / "model.pt")
    with pytest.raises(CheckError, match=r"cannot be read without running code\. Save network.state_dict\(\)"):
        check_weights(BundleFolder(tmp_path))
    write_state(tmp_path / "models" / "model.pt", STATE, "the network")
    check_weights(BundleFolder(tmp_path))


CODE = """
import resource, sys, torch
from monai_petl.files.torch_files import write_state
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
write_state(sys.argv[1], {"a": torch.ones(100_000)}, "the network")
"""


def test_a_limit_of_the_size_keeps_the_former_file_and_says_what_is_needed(tmp_path):
    path = write_state(tmp_path / "model.pt", STATE, "the network")
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"cannot write the network to {path}: torch could not write it whole" in last
    assert "It needs 0.4 MiB." in last
    assert last.endswith("The former file is kept.")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_a_full_disk_while_a_network_is_saved_is_a_sentence(tmp_path, monkeypatch):
    def full(state, path, *args):
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    network = torch.nn.Linear(2, 2)
    save_network(network, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write the network to .*the disk is full.*The former file is kept"):
        save_network(network, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before
