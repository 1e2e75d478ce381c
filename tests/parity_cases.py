"""Reads the parity fixtures under `tests/parity/` and compares results with them.

A fixture is a folder with `cases.json` (inputs and weights as a rule, never as data) and `expected.npz` (recorded
outputs, strided where large). Each folder's README.md says what its cases mean.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PARITY_FOLDER = Path(__file__).parent / "parity"

Case = dict[str, Any]
Expected = Mapping[str, np.ndarray]


def load_cases(folder: str, kind: str | None = None) -> list[Case]:
    """The cases of `tests/parity/<folder>`, those of one `kind` when it is given, in the file's order."""
    cases = json.loads((PARITY_FOLDER / folder / "cases.json").read_text(encoding="utf-8"))
    return [case for case in cases if kind is None or case["kind"] == kind]


def load_expected(folder: str) -> Expected:
    """All recorded arrays of `tests/parity/<folder>` under `<case name>/<output name>`."""
    with np.load(PARITY_FOLDER / folder / "expected.npz") as arrays:
        return dict(arrays)


def tensor(row: Mapping[str, Any]) -> Tensor:
    """The float32 tensor that a row of `case["tensors"]` stands for: a normal draw seeded by the name."""
    seed = zlib.crc32(row["name"].encode()) % 2**31
    draw = np.random.RandomState(seed).standard_normal(row["shape"]).astype(np.float32)
    if row.get("rule") == "0.5+abs(z)":
        value = np.float32(0.5) + np.abs(draw)
    else:
        value = np.float32(row["mean"]) + np.float32(row["std"]) * draw
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def tensors(case: Case, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a case whose names begin with `prefix`, which is cut off the keys."""
    rows = (row for row in case["tensors"] if row["name"].startswith(prefix))
    return {row["name"].removeprefix(prefix): tensor(row) for row in rows}


def coordinate_volume(view: Mapping[str, Any]) -> Tensor:
    """Coordinates (B, 3, H, W, D) in voxels of a row with `size` and, per batch element, `matrix` and `offset`."""
    axes = [np.arange(size, dtype=np.float64) - (size - 1) / 2 for size in view["size"]]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, H, W, D)
    volumes = [
        np.einsum("ac,chwd->ahwd", np.asarray(affine["matrix"]), grid) + np.reshape(affine["offset"], (3, 1, 1, 1))
        for affine in view["maps"]
    ]
    return torch.from_numpy(np.stack(volumes).astype(np.float32))


def check(expected: Expected, case: Case, name: str, value: Tensor) -> float:
    """Compares `value` with the output `name` of `case`, within its recorded tolerance.

    Returns:
        The largest absolute deviation on the stored values.

    Raises:
        AssertionError: a shape or a value differs; the message names the output and says by how much.
    """
    row = case["outputs"][name]
    label = f"{case['name']}/{name}"
    actual = value.detach().cpu().numpy()
    assert list(actual.shape) == row["shape"], f"{label}: shape {list(actual.shape)}, expected {row['shape']}"
    actual = actual[tuple(slice(None, None, step) for step in row.get("stride", [1] * actual.ndim))]
    recorded = expected[label]
    if row["tolerance"] == 0:
        differing = int((actual != recorded).sum())
        assert differing == 0, f"{label}: {differing} of {recorded.size} values differ, expected none"
        return 0.0
    deviation = float(np.abs(actual.astype(np.float64) - recorded).max(initial=0.0))
    assert deviation <= row["tolerance"], f"{label}: deviates by {deviation:.2e}, tolerance {row['tolerance']:.1e}"
    return deviation
