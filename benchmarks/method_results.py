"""Quality on real data: every method on a frozen, inflated vision transformer, against the head alone and full fine-tuning.

    python benchmarks/method_results.py tune hippocampus --data PATH --weights dinov2_vits14.safetensors --out results/methods
    python benchmarks/method_results.py train hippocampus --data PATH --weights dinov2_vits14.safetensors --out results/methods
    python benchmarks/method_results.py table results/methods

Each method has the same tuning budget: two learning rates, of which the better one on the validation volumes (seed 0) is
used for all that follows. Runs that are in OUT/runs.jsonl already are not repeated.
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
}
FEWER_WINDOWS = {"brain": {"batch_size": 1}}  # windows of a whole brain are large: two a step, not four
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
}


def tune(setting: str, data: str, weights: str, out: str, methods: tuple[str, ...] = tuple(CANDIDATES)) -> None:
    """Score every candidate on the validation volumes, with three labelled volumes and seed 0."""
    arms = {
        f"{method} {i}": {"method": method, **options}
        for method in methods
        for i, options in enumerate(CANDIDATES[method])
    }
    _comparison(setting, data, weights, out, arms).fill(tuple(arms), (3,), (0,), "validation")


def train(
    setting: str,
    data: str,
    weights: str,
    out: str,
    methods: tuple[str, ...] = tuple(CANDIDATES),
    counts: Counts = (3,),
    seeds: tuple[int, ...] = (0, 1, 2),
) -> None:
    """Train every method and score it on the test volumes; appends to OUT/runs.jsonl."""
    arms = {method: {"method": method, **CANDIDATES[method][CHOSEN[method]]} for method in methods}
    _comparison(setting, data, weights, out, arms).fill(methods, counts, seeds, "test")


def table(out: str) -> None:
    """Print the table of OUT/runs.jsonl in Markdown: mean ± standard deviation over the seeds."""
    quality.table(out, tuple(CANDIDATES), ("full", "head"))


def _comparison(setting: str, data: str, weights: str, out: str, arms: dict[str, dict[str, Any]]) -> Comparison:
    settings = {**settings_of(setting, weights), **FEWER_WINDOWS.get(setting, {})}
    return Comparison(bundle_copy(BUNDLE, out), data, settings, arms, {})


if __name__ == "__main__":
    fire.Fire({"tune": tune, "train": train, "table": table})
