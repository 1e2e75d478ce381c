"""A file that was changed, cut off or made by hand is refused by name, whatever is in it; no other error leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import ViT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from monai_petl import AdapterFileError, adapt, inspect_adapter, load_adapter, save_adapter
from monai_petl.core.adapter_file import CHECKSUM, checksum
from monai_petl.methods import FullFineTuning, LoRA
from tests.conftest import Run

OPTIONS = {"in_channels": 1, "img_size": (8, 8), "patch_size": (4, 4), "hidden_size": 8, "mlp_dim": 8, "num_layers": 1}


def network(seed: int = 0) -> ViT:
    torch.manual_seed(seed)
    return ViT(**OPTIONS, num_heads=2, spatial_dims=2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_adapter(adapt(network(), LoRA(rank=2)), tmp_path / "a.safetensors", {"hospital": "A"})


def changed(file: Path, name: str, text: str, sound: bool = True) -> Path:
    """The file with another text in its header; with a checksum that fits, so that the text itself is looked at."""
    with safe_open(file, "pt") as opened:
        header = dict(opened.metadata())
    tensors = load_file(file)
    header[name] = text
    if sound:
        header[CHECKSUM] = checksum(header, tensors)
    save_file(tensors, file, header)
    return file


def test_a_changed_value_is_refused(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for read in (inspect_adapter, lambda path: load_adapter(network(), path)):
        with pytest.raises(AdapterFileError, match=rf"{file} was changed after it was saved.*Copy it again"):
            read(file)


@pytest.mark.parametrize("name", ["methods", "notes", "class_names", "network"])
def test_a_changed_header_is_refused(file, name):
    with safe_open(file, "pt") as opened:
        text = opened.metadata()[name]
    new = text.replace('"rank": 2', '"rank": 3').replace("A", "B").replace("[]", '["x"]').replace("ViT", "Vit")
    assert new != text
    changed(file, name, new, False)
    with pytest.raises(AdapterFileError, match="was changed after it was saved"):
        load_adapter(network(), file)


def test_a_file_without_a_checksum_is_read_and_inspect_says_so(file, run: Run):
    assert "checksum      as it was saved" in run("adapter", "inspect", file)
    with safe_open(file, "pt") as opened:
        header = {name: text for name, text in opened.metadata().items() if name != CHECKSUM}
    save_file(load_file(file), file, header)
    assert "checksum      none" in run("adapter", "inspect", file)
    load_adapter(network(), file)


def test_loading_a_file_without_a_checksum_is_logged(file, caplog):
    with safe_open(file, "pt") as opened:
        header = {name: text for name, text in opened.metadata().items() if name != CHECKSUM}
    with caplog.at_level("INFO", "monai_petl"):
        load_adapter(network(), file)
        assert "no checksum" not in caplog.text
        save_file(load_file(file), file, header)
        load_adapter(network(), file)
    assert f"{file} has no checksum" in caplog.text


@pytest.mark.parametrize("name", ["sha257", "Sha256", "", "x" * 100_000])
def test_a_checksum_under_another_name_is_no_missing_one(file, name):
    with safe_open(file, "pt") as opened:
        header = dict(opened.metadata())
    header[name] = header.pop(CHECKSUM)
    save_file({n: t + 1 for n, t in load_file(file).items()}, file, header)
    with pytest.raises(AdapterFileError, match=r"header is damaged \(unknown entry"):
        load_adapter(network(), file)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused_without_a_checksum_too(file, value):
    with safe_open(file, "pt") as opened:
        header = {name: text for name, text in opened.metadata().items() if name != CHECKSUM}
    save_file({n: t * 0 + value for n, t in load_file(file).items()}, file, header)
    with pytest.raises(AdapterFileError, match=rf"{file} holds NaN or infinity in .*lora_"):
        load_adapter(network(), file)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("methods", "[" * 100_000),
        ("methods", '[{"method": "LoRA", "rank": -1}]'),
        ("methods", '[{"method": "LoRA", "rank": "two"}]'),
        ("methods", '[{"method": "LoRA", "rank": null}]'),
        ("methods", '[{"method": "LoRA", "targets": 5}]'),
        ("methods", '[{"method": "LoRA", "rank": 2, "rank": 3}]'),
        ("methods", '{"method": "LoRA"}'),
        ("methods", "7"),
        ("also_train", '"out"'),
        ("also_train", "[1]"),
        ("class_names", "[[]]"),
        ("fingerprint", "{}"),
        ("fingerprint", "NaN"),
        ("fingerprint", '{"cls_token": NaN}'),
        ("fingerprint", '{"cls_token": ""}'),
        ("fingerprint", '{"a":' * 50_000 + "1" + "}" * 50_000),
        ("format_version", "two"),
        ("notes", "{"),
        ("versions", "Infinity"),
    ],
)
def test_a_header_that_means_nothing_is_refused_by_the_files_name(file, name, text):
    before = {n: t.clone() for n, t in network().state_dict().items()}
    backbone = network()
    with pytest.raises(AdapterFileError, match=str(file)):
        load_adapter(backbone, changed(file, name, text))
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())
    assert set(backbone.state_dict()) == set(before)


def test_an_adapter_that_trains_everything_needs_no_fingerprint(tmp_path):
    file = save_adapter(adapt(network(), FullFineTuning()), tmp_path / "full.safetensors")
    assert list(load_adapter(network(), file).state_dict()) == list(network().state_dict())


@pytest.mark.parametrize("content", [b"", b"no adapter", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{" * 16])
def test_what_is_no_safetensors_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"a\.safetensors is not an adapter file, or is damaged"):
        inspect_adapter(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        inspect_adapter(tmp_path)


def test_no_mutation_passes_or_ends_in_another_error(file):
    """Bytes that are changed, cut out or doubled, 400 times: refused, or read as it was saved."""
    random, original = np.random.default_rng(0), file.read_bytes()
    header = json.loads(original[8 : 8 + int.from_bytes(original[:8], "little")])
    assert CHECKSUM in header["__metadata__"]
    wanted = load_file(file)
    refused = 0
    for _ in range(400):
        data = bytearray(original)
        place = int(random.integers(len(data)))
        kind = random.integers(3)
        if kind == 0:
            data[place] = int(random.integers(256))
        elif kind == 1:
            del data[place : place + int(random.integers(1, 40))]
        else:
            data[place:place] = data[place : place + int(random.integers(1, 40))]
        file.write_bytes(data)
        try:
            inspect_adapter(file)
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(file).items())
        except AdapterFileError as error:
            refused += str(file) in str(error)
    assert refused > 390


def test_an_adapter_with_nan_is_not_saved(tmp_path):
    adapted = adapt(network(), LoRA(rank=2))
    file = save_adapter(adapted, tmp_path / "a.safetensors")
    before = file.read_bytes()
    with torch.no_grad():
        next(p for p in adapted.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"hold NaN or infinity\. The training has diverged"):
        save_adapter(adapted, file)
    assert file.read_bytes() == before
