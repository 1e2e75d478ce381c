"""Quality on real data: pre-train PUNet on base classes, teach it a new one, score the test split.

Every figure of docs/results.md comes from this script. It runs the bundle's configs and overrides top-level ids only.

    python benchmarks/punet_results.py pretrain hippocampus --data PATH --out results/hippocampus
    python benchmarks/punet_results.py adapt hippocampus --data PATH --out results/hippocampus
    python benchmarks/punet_results.py table results/hippocampus

Runs that are in OUT/runs.jsonl already are not repeated.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import fire
import quality
from quality import Comparison, Counts, bundle_copy, circumstances, run

from monai_petl.methods import PUNET_METHODS

BUNDLE = "punet_ct_segmentation"

SETTINGS: dict[str, dict[str, Any]] = {
    "hippocampus": {
        "both": {
            "base_classes": ["anterior hippocampus"],
            "spacing": [1.0, 1.0, 1.0],
            "normalisation": "percentile",
            "patch_size": [48, 64, 1],
            "slab_size": [48, 64, 1],
            "num_workers": 0,
            "cache_rate": 1.0,
        },
        "pretrain": {
            "teacher_size": [48, 64, 1],
            "student_sizes": [[48, 64, 1], [32, 48, 1]],
            "batch_size": 2,
            "epochs": 12,
            "epoch_length": 150,
            "val_interval": 2,
            "cpa_weight": 0.1,
            "lr_schedule": "one_cycle",
            "body_lr": 1e-3,
            "prompt_lr": 5e-3,
        },
        "adapt": {"new_class": "posterior hippocampus", "batch_size": 2, "epochs": 4, "epoch_length": 25},
    },
    "ct": {
        "both": {
            "base_classes": ["vertebrae", "back_muscle", "gluteus", "hip_bone", "colon"],
            "spacing": [3.0, 3.0, 3.0],
            "intensity_window": [-200, 300],
            "patch_size": [64, 112, 1],
            "slab_size": [64, 112, 1],
            "num_workers": 0,
            "cache_rate": 1.0,
        },
        "pretrain": {
            "teacher_size": [64, 112, 1],
            "student_sizes": [[64, 112, 1], [48, 80, 1]],
            "batch_size": 1,
            "samples_per_volume": 4,
            "epochs": 8,
            "epoch_length": 75,
            "val_interval": 99,
            "cpa_weight": 0.1,
            "lr_schedule": "one_cycle",
            "body_lr": 1e-3,
            "prompt_lr": 5e-3,
        },
        "adapt": {"new_class": "kidney", "batch_size": 1, "samples_per_volume": 4, "epochs": 4, "epoch_length": 25},
    },
}
PROMPTS = {"lr": 5e-2, "prompt_init": "mean"}
TUNING: dict[str, dict[str, Any]] = {  # learning rates chosen on the validation split of hippocampus, 10 volumes
    **dict.fromkeys(PUNET_METHODS, PROMPTS),
    "prompt_bias": {"lr": 2e-2, "prompt_init": "mean"},
    "head": {"lr": 1e-1},
    "bias": {"lr": 2e-2},
    "adapter": {"lr": 5e-3},
    "decoder": {"lr": 2e-3},
    "full": {"lr": 5e-4, "prompt_init": "mean"},
    "full_head": {"lr": 1e-3},
    "scratch": {"lr": 1e-3},
}


def pretrain(setting: str, data: str, out: str, seed: int = 0, **overrides: Any) -> None:
    """Pre-train the backbone; writes OUT/bundle/models/model.pt and OUT/pretrain.json."""
    chosen, root = SETTINGS[setting], bundle_copy(BUNDLE, out)
    start = time.perf_counter()
    options = {**chosen["both"], **chosen["pretrain"], "seed": seed, **overrides}
    workflow = run(["pretrain.json"], root, data, options)
    seconds = time.perf_counter() - start
    validated = workflow.parser.get_parsed_content("validates")
    record = {
        "setting": setting,
        "seconds": round(seconds, 1),
        "validation": validated and float(workflow.parser.get_parsed_content("validate::evaluator").state.best_metric),
        **circumstances(),
        **overrides,
    }
    (Path(out) / "pretrain.json").write_text(json.dumps(record, indent=4) + "\n", encoding="utf-8")
    print(json.dumps(record))


def adapt(
    setting: str,
    data: str,
    out: str,
    methods: tuple[str, ...] = tuple(PUNET_METHODS),
    counts: Counts = (3, 10, None),
    seeds: tuple[int, ...] = (0, 1, 2),
    section: str = "test",
    **overrides: Any,
) -> None:
    """Teach the new class by every method, with every number of labelled volumes and seed; appends to OUT/runs.jsonl."""
    chosen, root = SETTINGS[setting], bundle_copy(BUNDLE, out)
    backbone = str(root / "models/model.pt")
    settings = {**chosen["both"], **chosen["adapt"], "pretrained_path": backbone}
    arms = {method: {"method": method, **TUNING[method], **overrides} for method in methods}
    Comparison(root, data, settings, arms, {"ckpt_path": backbone}).fill(methods, counts, seeds, section)


def table(out: str) -> None:
    """Print the table of OUT/runs.jsonl in Markdown: mean ± standard deviation over the seeds, and the gap to ``full``."""
    quality.table(out, tuple(PUNET_METHODS), ("full", "prompt"))


if __name__ == "__main__":
    fire.Fire({"pretrain": pretrain, "adapt": adapt, "table": table})
