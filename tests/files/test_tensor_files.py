"""Tensor files appear whole or not at all."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from monai_petl.files.tensor_files import write_tensors


def test_tensors_and_header_come_back(tmp_path):
    path = write_tensors(tmp_path / "new" / "a.safetensors", {"x": torch.arange(6.0).view(2, 3).T}, {"k": "v"}, "it")
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.arange(6.0).view(2, 3).T)
        assert file.metadata() == {"k": "v"}
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OSError, match=r"cannot write the weights to .*file/a\.safetensors"):
        write_tensors(tmp_path / "file" / "a.safetensors", {"x": torch.zeros(1)}, {}, "the weights")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
