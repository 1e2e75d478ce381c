"""What the scripts that measure quality share: training and scoring a bundle in a process of its own, records and tables."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

from monai_petl import summary

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
Options = Mapping[str, Any]
Counts = Sequence[int | None]


@dataclass(frozen=True)
class Comparison:
    """Trainings of one bundle that differ in the overrides of an arm, the number of labelled volumes and the seed.

    Args:
        root: the bundle, a copy in the folder of the results (:func:`bundle_copy`).
        data: folder of the data set.
        settings: top-level ids that all trainings share.
        arms: name of a way to train and its top-level ids.
        scoring: top-level ids of the evaluation besides those of the training.
    """

    root: Path
    data: str
    settings: Options
    arms: Mapping[str, Options]
    scoring: Options

    def fill(self, arms: Sequence[str], counts: Counts, seeds: Sequence[int], section: str) -> None:
        """Run what runs.jsonl beside the bundle does not hold yet; several processes may fill one table."""
        log = self.root.parent / "runs.jsonl"
        for count, seed, arm in product(counts, seeds, arms):
            if (section, arm, count, seed) in {_key(run) for run in _records(log)}:
                continue
            options = {**self.settings, **self.arms[arm], "num_labelled": count, "seed": seed}
            options |= {"ckpt_dir": str(self.root.parent / f"trained_{os.getpid()}")}
            options["val_interval"] = options["epochs"] + 1  # the network of the end counts
            with ProcessPoolExecutor(
                1, get_context("fork")
            ) as pool:  # a process a run: each has its own peak of memory
                measured = pool.submit(self._once, options, section).result()
            record = {"section": section, "variant": arm, "labelled": count, "seed": seed, **measured}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)

    def _once(self, options: Options, section: str) -> dict[str, Any]:
        shutil.rmtree(options["ckpt_dir"], ignore_errors=True)
        start, busy, before = time.perf_counter(), time.process_time(), _peak_bytes()
        training = run(["train.json"], self.root, self.data, options).parser
        seconds, busy, peak = time.perf_counter() - start, time.process_time() - busy, _peak_bytes() - before
        adapter = Path(training.get_parsed_content("adapter_path"))
        scoring = {**options, **self.scoring, "eval_section": section}
        scored = run(["train.json", "evaluate.json"], self.root, self.data, scoring).parser
        dice = scored.get_parsed_content("validate::evaluator").state.metrics["val_mean_dice"]
        return {
            "dice": round(float(dice), 5),
            "trained": summary(training.get_parsed_content("adapted_network")).trainable,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(busy, 1),  # not lengthened by what else the machine does
            "peak_bytes": peak,
            "file_bytes": adapter.stat().st_size,
            "lr": training.get_parsed_content("lr"),
            "steps": options["epochs"] * options["epoch_length"],
            **circumstances(),
        }


def run(configs: Sequence[str], root: Path, data: str, overrides: Options) -> ConfigWorkflow:
    """Run configs of a bundle to the end."""
    workflow = prepare(configs, root, data, overrides)
    workflow.run()
    workflow.finalize()
    return workflow


def prepare(configs: Sequence[str], root: Path, data: str, overrides: Options) -> ConfigWorkflow:
    """Configs of a bundle, ready to run or to be asked for their parts."""
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
    return workflow


def bundle_copy(bundle: str, out: str) -> Path:
    """A copy of the bundle's configs in OUT/bundle, so that nothing is written into the repository."""
    root = Path(out).resolve() / "bundle"
    shutil.copytree(BUNDLES / bundle / "configs", root / "configs", dirs_exist_ok=True)
    return root


def table(out: str, arms: Sequence[str], gap: tuple[str, str]) -> None:
    """Print the table of OUT/runs.jsonl in Markdown: mean ± standard deviation over the seeds, and a gap of two arms."""
    runs = [run for run in _records(Path(out) / "runs.jsonl") if run["section"] == "test"]
    counts = sorted({run["labelled"] for run in runs}, key=lambda count: count or math.inf)
    print("| variant | trained | " + " | ".join(f"{c or 'all'} volumes" for c in counts) + " | s | memory, MB | file |")
    print("| --- " + "| ---: " * (len(counts) + 4) + "|")
    means: dict[tuple[str, int | None], float] = {}
    for arm in arms:
        rows = [run for run in runs if run["variant"] == arm]
        if not rows:
            continue
        cells = []
        for count in counts:
            dice = [100 * run["dice"] for run in rows if run["labelled"] == count]
            spread = f" ± {stdev(dice):.1f}" if len(dice) > 1 else ""
            cells.append(f"{mean(dice):.1f}{spread}" if dice else "not run")
            if dice:
                means[arm, count] = mean(dice)
        cells.append(f"{mean(run['seconds'] for run in rows):.0f}")
        cells.append(f"{mean(run['peak_bytes'] for run in rows) / 1e6:.0f}")
        cells.append(f"{rows[0]['file_bytes'] / 1e6:,.2f} MB")
        print(f"| `{arm}` | {rows[0]['trained']:,} | " + " | ".join(cells) + " |")
    ahead, behind = gap
    gaps = [
        f"{means[ahead, c] - means[behind, c]:.1f} ({c or 'all'})"
        for c in counts
        if {(ahead, c), (behind, c)} <= means.keys()
    ]
    print(f"\n`{ahead}` minus `{behind}`, percentage points (volumes): {', '.join(gaps)}")


def circumstances() -> dict[str, Any]:
    """Device, version and date of a run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": f"{device}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": str(date.today()),
    }


def _records(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def _key(run: Mapping[str, Any]) -> tuple[str, str, int | None, int]:
    return run["section"], run["variant"], run["labelled"], run["seed"]


def _peak_bytes() -> int:
    """Largest memory so far: of the GPU where there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
