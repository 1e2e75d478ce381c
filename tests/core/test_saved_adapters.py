"""Adapter files of earlier versions load unchanged and answer as they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import monai_petl as mp
from tests.core.saved_networks import SAVED, backbone, output

FILES = sorted((Path(__file__).parent / "saved").rglob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_adapter_of_an_earlier_version_loads_and_answers_as_it_did(path: Path) -> None:
    build, _, _, shape = SAVED[path.stem]
    expected, plain = load_file(path.with_suffix(".expected"))["output"], output(backbone(build), shape)
    network = mp.load_adapter(backbone(build), path)
    torch.testing.assert_close(output(network, shape), expected, rtol=1e-4, atol=1e-5)
    assert plain.shape != expected.shape or (plain - expected).abs().max() > 1e-3


def test_every_kind_is_kept() -> None:
    assert {path.stem for path in FILES} == set(SAVED)
