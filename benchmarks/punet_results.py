"""Quality on real data: pre-train PUNet on base classes, teach it a new one, score the test split.

Every figure of docs/results.md comes from this script. It runs the bundle's configs and overrides top-level ids only.

    python benchmarks/punet_results.py pretrain hippocampus --data PATH --out results/hippocampus
    python benchmarks/punet_results.py adapt hippocampus --data PATH --out results/hippocampus
    python benchmarks/punet_results.py table results/hippocampus

Runs that are in OUT/runs.jsonl already are not repeated.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import fire
import torch
from monai.bundle import ConfigWorkflow

from monai_petl import summary
from monai_petl.methods import PUNET_VARIANTS

BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "punet_ct_segmentation"

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
Key = tuple[str, str, int | None, int]  # section, variant, labelled volumes, seed
PROMPTS = {"lr": 5e-2, "prompt_init": "mean"}
TUNING: dict[str, dict[str, Any]] = {  # learning rates chosen on the validation split of hippocampus, 10 volumes
    **dict.fromkeys(PUNET_VARIANTS, PROMPTS),
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
    chosen, root = SETTINGS[setting], _bundle_copy(out)
    start = time.perf_counter()
    options = {**chosen["both"], **chosen["pretrain"], "seed": seed, **overrides}
    workflow = _run(["pretrain.json"], root, data, options)
    seconds = time.perf_counter() - start
    validated = workflow.parser.get_parsed_content("validates")
    record = {
        "setting": setting,
        "seconds": round(seconds, 1),
        "validation": validated and float(workflow.parser.get_parsed_content("validate::evaluator").state.best_metric),
        **_circumstances(),
        **overrides,
    }
    (Path(out) / "pretrain.json").write_text(json.dumps(record, indent=4) + "\n", encoding="utf-8")
    print(json.dumps(record))


def adapt(
    setting: str,
    data: str,
    out: str,
    variants: tuple[str, ...] = tuple(PUNET_VARIANTS),
    counts: tuple[int | None, ...] = (3, 10, None),
    seeds: tuple[int, ...] = (0, 1, 2),
    section: str = "test",
    **overrides: Any,
) -> None:
    """Teach the new class by every variant, with every number of labelled volumes and seed; appends to OUT/runs.jsonl."""
    chosen, root, log = SETTINGS[setting], _bundle_copy(out), Path(out) / "runs.jsonl"

    def done() -> set[Key]:  # several processes may fill one table
        return (
            {_key(json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines()} if log.exists() else set()
        )

    for count in counts:
        for seed in seeds:
            for variant in variants:
                if (section, variant, count, seed) in done():
                    continue
                options = {**chosen["both"], **chosen["adapt"], "variant": variant, "num_labelled": count, "seed": seed}
                options |= {**TUNING[variant], "val_interval": options["epochs"] + 1}
                options |= {
                    "ckpt_dir": str(Path(out).resolve() / f"adapted_{os.getpid()}"),
                    "pretrained_path": str(root / "models/model.pt"),
                }
                with ProcessPoolExecutor(
                    1, get_context("fork")
                ) as pool:  # a process a run: each has its own peak of memory
                    record = pool.submit(_adapt_once, root, data, {**options, **overrides}, section).result()
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)


def table(out: str) -> None:
    """Print the table of OUT/runs.jsonl in Markdown: mean ± standard deviation over the seeds, and the gap to ``full``."""
    runs = [json.loads(line) for line in (Path(out) / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    runs = [run for run in runs if run["section"] == "test"]
    counts = sorted({run["labelled"] for run in runs}, key=lambda count: count or math.inf)
    print("| variant | trained | " + " | ".join(f"{c or 'all'} volumes" for c in counts) + " | s | memory, MB | file |")
    print("| --- " + "| ---: " * (len(counts) + 4) + "|")
    means: dict[tuple[str, int | None], float] = {}
    for variant in PUNET_VARIANTS:
        rows = [run for run in runs if run["variant"] == variant]
        if not rows:
            continue
        cells = []
        for count in counts:
            dice = [100 * run["dice"] for run in rows if run["labelled"] == count]
            spread = f" ± {stdev(dice):.1f}" if len(dice) > 1 else ""
            cells.append(f"{mean(dice):.1f}{spread}" if dice else "not run")
            if dice:
                means[variant, count] = mean(dice)
        cells.append(f"{mean(run['seconds'] for run in rows):.0f}")
        cells.append(f"{mean(run['peak_bytes'] for run in rows) / 1e6:.0f}")
        cells.append(f"{rows[0]['file_bytes'] / 1e3:,.0f} kB")
        print(f"| `{variant}` | {rows[0]['trained']:,} | " + " | ".join(cells) + " |")
    gaps = [
        f"{means['full', c] - means['prompt', c]:.1f} ({c or 'all'})"
        for c in counts
        if {("full", c), ("prompt", c)} <= means.keys()
    ]
    print(f"\nFull fine-tuning minus prompt tuning, percentage points (volumes): {', '.join(gaps)}")


def _adapt_once(root: Path, data: str, options: dict[str, Any], section: str) -> dict[str, Any]:
    shutil.rmtree(options["ckpt_dir"], ignore_errors=True)
    start, before = time.perf_counter(), _peak_bytes()
    workflow = _run(["train.json"], root, data, options)
    seconds, peak = time.perf_counter() - start, _peak_bytes() - before
    network = workflow.parser.get_parsed_content("adapted_network")
    adapter = Path(workflow.parser.get_parsed_content("adapter_path"))
    scored = _run(
        ["train.json", "evaluate.json"],
        root,
        data,
        {
            **options,
            "ckpt_path": options["pretrained_path"],
            "adapter_dir": str(adapter.parent),
            "eval_section": section,
        },
    )
    dice = scored.parser.get_parsed_content("validate::evaluator").state.metrics["val_mean_dice"]
    return {
        "section": section,
        "variant": options["variant"],
        "labelled": options["num_labelled"],
        "seed": options["seed"],
        "dice": round(float(dice), 5),
        "trained": summary(network).trainable,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "file_bytes": adapter.stat().st_size,
        "lr": options["lr"],
        "steps": options["epochs"] * options["epoch_length"],
        **_circumstances(),
    }


def _run(configs: list[str], root: Path, data: str, overrides: dict[str, Any]) -> ConfigWorkflow:
    folder = root / "configs"
    workflow = ConfigWorkflow(
        config_file=[str(folder / name) for name in configs],
        meta_file=str(folder / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(root),
        dataset_dir=str(data),
        output_dir=str(root / "eval"),
        **overrides,
    )
    logging.getLogger().setLevel(logging.WARNING)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def _bundle_copy(out: str) -> Path:
    """A copy of the bundle's configs in OUT/bundle, so that nothing is written into the repository."""
    root = Path(out).resolve() / "bundle"
    shutil.copytree(BUNDLE / "configs", root / "configs", dirs_exist_ok=True)
    return root


def _key(run: dict[str, Any]) -> Key:
    return run["section"], run["variant"], run["labelled"], run["seed"]


def _peak_bytes() -> int:
    """Largest memory so far: of the GPU where there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _circumstances() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": f"{device}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": str(date.today()),
    }


if __name__ == "__main__":
    fire.Fire({"pretrain": pretrain, "adapt": adapt, "table": table})
