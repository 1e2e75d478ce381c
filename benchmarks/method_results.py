"""Quality on real data: every method on a frozen, inflated vision transformer, against the head alone and full fine-tuning.

    python benchmarks/method_results.py tune hippocampus --data PATH --weights dinov2_vits14.safetensors --out results/methods
    python benchmarks/method_results.py train hippocampus --data PATH --weights dinov2_vits14.safetensors --out results/methods
    python benchmarks/method_results.py table results/methods

In ``brain`` and ``hippocampus`` an inflated transformer segments, in ``brain_slices`` and ``hippocampus_slices`` the 2D one,
slice by slice, which AIM lets see along depth. Each method has the same tuning budget: two learning rates, of which the better
one on the validation volumes (hippocampus, seed 0) is used for all that follows. Runs that OUT/runs.jsonl holds are not
repeated.
"""

from __future__ import annotations

from typing import Any

import fire
import quality
from inflation_results import BUNDLE, settings_of
from quality import Comparison, Counts, bundle_copy

CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "head": [{"lr": 2e-3}, {"lr": 5e-3}],
    **{method: [{"delta_lr": 1e-3}, {"delta_lr": 5e-3}] for method in ("lora", "vpetl", "ffn_adapter", "vpt", "ssf")},
    "bias": [{"backbone_lr": 1e-3}, {"backbone_lr": 5e-3}],
    "norm": [{"backbone_lr": 1e-3}, {"backbone_lr": 5e-3}],
    "last_blocks": [{"backbone_lr": 1e-5}, {"backbone_lr": 1e-4}],
    "full": [{"backbone_lr": 1e-5}, {"backbone_lr": 1e-4}],
    "aim": [{"delta_lr": 1e-3}, {"delta_lr": 5e-3}],
}
CHOSEN = {  # which of the candidates was better on the validation volumes
    "head": 0,
    "lora": 0,
    "vpetl": 0,
    "ffn_adapter": 0,
    "vpt": 1,
    "ssf": 0,
    "bias": 0,
    "norm": 1,
    "last_blocks": 1,
    "full": 0,
    "aim": 0,
}
INFLATED = tuple(method for method in CANDIDATES if method != "aim")
SLICED = ("head", "lora", "aim", "full")
FEWER = {"batch_size": 1}  # two windows a step, not four
OPTIONS: dict[str, dict[str, Any]] = {  # besides what comparisons of inflation share
    "hippocampus": {},
    "brain": FEWER,
    "hippocampus_slices": {**FEWER, "spacing": [0.5, 0.5, 2.0], "patch_size": [84, 112, 5], "slab_size": [84, 112, 5]},
    "brain_slices": {**FEWER, "spacing": [2.0, 2.0, 2.0], "patch_size": [98, 112, 5], "slab_size": [98, 112, 5]},
}


def tune(setting: str, data: str, weights: str, out: str, methods: tuple[str, ...] | None = None) -> None:
    """Score every candidate on the validation volumes, with three labelled volumes and seed 0."""
    arms = {
        f"{method} {i}": {"method": method, **options}
        for method in _methods(setting, methods)
        for i, options in enumerate(CANDIDATES[method])
    }
    _comparison(setting, data, weights, out, arms).fill(tuple(arms), (3,), (0,), "validation")


def train(
    setting: str,
    data: str,
    weights: str,
    out: str,
    methods: tuple[str, ...] | None = None,
    counts: Counts = (3,),
    seeds: tuple[int, ...] = (0, 1, 2),
) -> None:
    """Train every method and score it on the test volumes; appends to OUT/runs.jsonl."""
    chosen = _methods(setting, methods)
    arms = {method: {"method": method, **CANDIDATES[method][CHOSEN[method]]} for method in chosen}
    _comparison(setting, data, weights, out, arms).fill(chosen, counts, seeds, "test")


def table(out: str) -> None:
    """Print the table of OUT/runs.jsonl in Markdown: mean ± standard deviation over the seeds."""
    quality.table(out, tuple(CANDIDATES), ("full", "head"))


def _comparison(setting: str, data: str, weights: str, out: str, arms: dict[str, dict[str, Any]]) -> Comparison:
    settings = {**settings_of(setting.removesuffix("_slices"), weights), **OPTIONS[setting]}
    if setting.endswith("_slices"):
        settings |= {"token_size": [14, 14], "sw_batch_size": 1}
        return Comparison(bundle_copy("aim_vit_segmentation", out), data, settings, arms, {})
    return Comparison(bundle_copy(BUNDLE, out), data, settings, arms, {})


def _methods(setting: str, methods: tuple[str, ...] | None) -> tuple[str, ...]:
    return methods or (SLICED if setting.endswith("_slices") else INFLATED)


if __name__ == "__main__":
    fire.Fire({"tune": tune, "train": train, "table": table})
