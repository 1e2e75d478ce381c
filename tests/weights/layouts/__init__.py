"""Published checkpoint layouts as small files by rule: names, shapes, values by name, and what the official class computed."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Layout", "layouts"]

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Layout:
    """One case of ``cases.json``."""

    family: str
    case: dict[str, Any]

    @property
    def name(self) -> str:
        return self.case["name"]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the official class."""
        return self.case["network"]["arguments"]

    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file; names that share one storage are the same tensor."""
        return dict(_made(self.family, self.name))

    def write(self, folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
        """The checkpoint as its training saves it."""
        state = self.tensors() if tensors is None else tensors
        if self.case["container"] == "safetensors":
            path = folder / f"{self.name}.safetensors"
            save_file(state, path)
            return path
        path = folder / f"{self.name}.pt"
        torch.save(_placed(self.case["file"], state), path)
        return path

    def of_use(self, use: str) -> dict[str, str]:
        """Names in the file -> names in the official class, of the tensors of a use: ``load``, ``leave out``, ``optional``."""
        return {spec["key"]: spec.get("target", spec["key"]) for spec in self.case["tensors"] if spec["use"] == use}

    def image(self) -> Tensor:
        """The input of the official run."""
        return _tensor(self.case["inputs"][0], np.load(HERE / self.family / "expected.npz"))

    def expected(self, meaning: str) -> tuple[np.ndarray, list[int], float]:
        """Stored output, stride, and the tolerance times its largest value."""
        output = next(one for one in self.case["outputs"] if one["key"] == f"{self.name}/{meaning}")
        values = np.load(HERE / self.family / "expected.npz")[output["key"]]
        return values, output["stride"], self.case["tolerance"] * output["max_abs"]


def layouts(family: str) -> list[Layout]:
    """All cases of a family."""
    cases = json.loads((HERE / family / "cases.json").read_text(encoding="utf-8"))["cases"]
    return [Layout(family, case) for case in cases]


@cache
def _made(family: str, name: str) -> dict[str, Tensor]:
    arrays, made, found = np.load(HERE / family / "expected.npz"), {}, {}
    for spec in next(layout for layout in layouts(family) if layout.name == name).case["tensors"]:
        tensor = made[spec["same_as"]] if spec.get("rule") == "same" else _tensor(spec, arrays)
        made[spec["name"]] = found[spec["key"]] = tensor
    return found


def _tensor(spec: dict[str, Any], arrays: Any) -> Tensor:
    rule, shape = spec.get("rule", "normal"), spec["shape"]
    if rule == "array":
        return torch.from_numpy(arrays[spec.get("array", spec["name"])])
    if rule in ("zeros", "ones"):
        return torch.full(shape, float(rule == "ones"))
    if rule == "int64 zero":
        return torch.zeros(shape, dtype=torch.int64)
    normal = np.random.RandomState(zlib.crc32(spec["name"].encode()) % 2**31).standard_normal(shape).astype(np.float32)
    mean, std = np.float32(spec.get("mean", 0)), np.float32(spec.get("std", 1))
    values = mean + (np.abs(std * normal) if rule == "positive" else std * normal)
    return torch.from_numpy(np.asarray(values, np.float32)).to(getattr(torch, spec.get("dtype", "float32")))


def _placed(file: Any, tensors: dict[str, Tensor]) -> Any:
    if file == "@tensors":
        return tensors
    if isinstance(file, dict):
        return {key: _placed(value, tensors) for key, value in file.items()}
    return file
