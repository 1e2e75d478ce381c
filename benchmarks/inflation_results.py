"""Quality on real data: a vision transformer pre-trained on photographs, inflated, against random weights.

    python benchmarks/inflation_results.py train brain --data PATH --weights dinov2_vits14.safetensors --out results/brain
    python benchmarks/inflation_results.py table results/brain

It runs the bundle's configs and overrides top-level ids only. Runs that are in OUT/runs.jsonl already are not repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fire
import quality
from quality import Comparison, Counts, bundle_copy

SETTINGS: dict[str, dict[str, Any]] = {
    "brain": {
        "class_names": ["csf", "cortical grey matter", "white matter", "deep grey matter"],
        "spacing": [1.5, 1.5, 1.0],
        "patch_size": [126, 154, 5],
        "slab_size": [126, 154, 5],
    },
    "hippocampus": {
        "class_names": ["anterior hippocampus", "posterior hippocampus"],
        "spacing": [0.5, 0.5, 1.0],
        "patch_size": [84, 112, 5],
        "slab_size": [84, 112, 5],
    },
}
VIT_S_14 = {"token_size": [14, 14, 5], "hidden_size": 384, "mlp_dim": 1536, "num_heads": 6}
TRAINING = {
    "normalisation": "percentile",
    "epochs": 4,
    "epoch_length": 25,
    "batch_size": 2,
    "samples_per_volume": 2,
    "num_workers": 0,
    "cache_rate": 1.0,
    "sw_batch_size": 4,
    "lr": 5e-3,
    "backbone_lr": 1e-5,  # layer scale is folded into the weights, and Adam's steps are as long for small weights
}
ARMS: dict[str, dict[str, Any]] = {
    "frozen, center": {"variant": "frozen"},
    "frozen, average": {"variant": "frozen", "inflation": "average"},
    "frozen, random": {"variant": "frozen", "pretrained_path": None},
    "full, center": {"variant": "full"},
    "full, average": {"variant": "full", "inflation": "average"},
    "scratch": {"variant": "scratch", "backbone_lr": 5e-4},
}


def train(
    setting: str,
    data: str,
    weights: str,
    out: str,
    arms: tuple[str, ...] = tuple(ARMS),
    counts: Counts = (1, 3, None),
    seeds: tuple[int, ...] = (0, 1, 2),
    section: str = "test",
    **overrides: Any,
) -> None:
    """Train and score every arm with every number of labelled volumes and seed; appends to OUT/runs.jsonl."""
    settings = {**SETTINGS[setting], **VIT_S_14, **TRAINING, "pretrained_path": str(Path(weights).resolve())}
    chosen = {name: {**options, **overrides} for name, options in ARMS.items()}
    Comparison(bundle_copy("inflated_vit_segmentation", out), data, settings, chosen, {}).fill(
        arms, counts, seeds, section
    )


def table(out: str) -> None:
    """Print the table of OUT/runs.jsonl in Markdown: mean ± standard deviation over the seeds."""
    quality.table(out, tuple(ARMS), ("full, center", "scratch"))


if __name__ == "__main__":
    fire.Fire({"train": train, "table": table})
