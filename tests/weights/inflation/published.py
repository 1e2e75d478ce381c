"""Reads the parity fixtures `tests/parity/convert` and `tests/parity/inflation`; their README.md says what the cases mean."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity_cases import PARITY_FOLDER

Case = dict[str, Any]


def load_cases(folder: str) -> list[Case]:
    """The cases of a folder."""
    return json.loads((PARITY_FOLDER / folder / "cases.json").read_text(encoding="utf-8"))["cases"]


def load_expected(folder: str) -> Mapping[str, np.ndarray]:
    """Recorded outputs under `<case>/<output>`."""
    with np.load(PARITY_FOLDER / folder / "expected.npz") as arrays:
        return dict(arrays)


def tensor(row: Mapping[str, Any]) -> Tensor:
    """The tensor that a row stands for: a normal draw seeded by its name."""
    rule = row.get("rule")
    if rule == "int64 zero":
        return torch.zeros(row["shape"], dtype=torch.int64)
    draw = np.random.RandomState(zlib.crc32(row["name"].encode()) % 2**31).standard_normal(row["shape"])
    value = np.float32(row["std"]) * draw.astype(np.float32)
    if rule == "positive":
        value = np.abs(value)
    return torch.from_numpy(np.asarray(np.float32(row["mean"]) + value, dtype=np.float32))


def image(case: Case, name: str = "") -> Tensor:
    """The input of a case, or its input `.<name>`."""
    wanted = f"input.{case['name']}{'.' * bool(name)}{name}"
    return tensor(next(row for row in case["inputs"] if row["name"] == wanted))


def deviation(expected: Mapping[str, np.ndarray], case: Case, output: str, value: Tensor, factor: float = 1) -> float:
    """The largest deviation relative to the output's largest magnitude; fails beyond `factor` times the case's tolerance."""
    row = next(row for row in case["outputs"] if row["key"] == f"{case['name']}/{output}")
    assert list(value.shape) == row["shape"], f"{row['key']}: shape {tuple(value.shape)}"
    strided = value.detach()[tuple(slice(None, None, step) for step in row["stride"])].numpy()
    error = float(np.abs(strided - expected[row["key"]]).max()) / row["max_abs"]
    assert error <= factor * case["tolerance"], f"{row['key']} deviates by {error:.1e} of its largest magnitude"
    return error
