"""Runs the PUNet bundle step by step: data, pre-training, prompt tuning, inference, report, comparison with other methods."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from monai.bundle import run as run_bundle

from monai_petl.compare import Plan, find_devices, run_plan
from monai_petl.core.adapters import inspect_adapter
from monai_petl.core.summary import summary as parameters_of
from monai_petl.data import DataError, load_datalist, make_phantom_dataset
from monai_petl.demo.checks import base_classes_unchanged, dice_by_class
from monai_petl.demo.report import write_report
from monai_petl.demo.settings import DemoSettings, settings_for
from monai_petl.files.atomic import write_text
from monai_petl.networks import PUNet

__all__ = ["demo"]

METHODS: dict[str, dict[str, Any]] = {  # with the learning rates of docs/results.md
    "prompt tuning": {"method": "prompt", "lr": 0.05, "prompt_init": "mean"},
    "LoRA": {"method": "lora", "lr": 0.005},
    "head only": {"method": "head", "lr": 0.1},
    "full fine-tuning": {"method": "full", "lr": 0.0005, "prompt_init": "mean"},
}
BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "punet_ct_segmentation"
T = TypeVar("T")


def demo(
    out: str = "demo",
    data: str | None = None,
    bundle: str | None = None,
    new_class: str | None = None,
    base_classes: Sequence[str] | None = None,
    labelled: int = 3,
    effort: float = 1.0,
    seed: int = 0,
) -> Path:
    """Pre-train, freeze, teach a new class from a few labelled volumes, segment, compare methods, and write ``report.html``.

    Args:
        out: folder for everything that is made; a former demo in it is replaced.
        data: a Decathlon-style folder; default phantoms, made on the spot.
        bundle: the bundle ``punet_ct_segmentation``; default the one of the source tree.
        new_class: the class to hold back and teach afterwards.
        base_classes: classes to pre-train on; default all others.
        labelled: number of labelled volumes of the new class.
        effort: factor on the number of training steps.
        seed: seed of the phantoms, the pre-training and the prompt tuning; the comparison takes 0 and 1.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: the bundle is not where it was looked for.
        FileExistsError: ``out`` holds something that is no demo.
        DataError: ``data`` cannot be used; ``out`` is left as it was.
    """
    source = Path(bundle) if bundle else BUNDLE
    if not (source / "configs" / "pretrain.json").is_file():
        raise FileNotFoundError(f"no bundle at {source}; run from a checkout of monai_petl, or give --bundle PATH")
    if data is not None:  # before a former demo is removed
        settings_for(Path(data), new_class, base_classes, labelled)
        _held_out(Path(data))
    if data is not None and Path(data).resolve().is_relative_to(Path(out).resolve()):
        raise FileExistsError(f"the data lies inside {out}, which the demo replaces; choose another folder with --out")
    root = _fresh_folder(Path(out).resolve())
    steps = Steps(root / "bundle")
    shutil.copytree(source, steps.bundle, ignore=shutil.ignore_patterns("models", "eval"))
    folder = steps.timed("make phantoms", lambda: _phantoms(root, seed)) if data is None else Path(data).resolve()
    settings = settings_for(folder, new_class, base_classes, labelled)
    section, cases = _held_out(folder)
    _train(steps, folder, settings, effort, seed)
    _segment(steps, folder, settings, section)
    summary = _measure(steps, folder, settings, cases)
    comparison = _compare(steps, folder, settings, section, effort)
    write_text(root / "summary.json", json.dumps(summary, indent=4) + "\n", "the summary")
    report = write_report(root, folder, summary, cases, steps.commands)
    new = settings.new_class
    _say(f"\nDice of {new}, by its prompts: {summary['dice'][new]:.3f}")
    _say(f"Report: {report}\nComparison of methods: {comparison}")
    return report


class Steps:
    """Runs steps, says what it does, and keeps time.

    Args:
        bundle: folder of the bundle that is run.
    """

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.seconds: dict[str, float] = {}
        self.commands: dict[str, str] = {}

    def bundle_run(self, name: str, config: str, overrides: dict[str, Any]) -> None:
        """Run a config of the bundle in this process, after printing the command that does the same."""
        file = str(self.bundle / "configs" / config)
        overrides = {"bundle_root": str(self.bundle), **overrides}
        shown = [f"--{key} {shlex.quote(v if isinstance(v, str) else str(v))}" for key, v in overrides.items()]
        self.commands[name] = " ".join([f"python -m monai.bundle run --config_file {shlex.quote(file)}", *shown])
        _say(f"\n$ {self.commands[name]}")
        with _quiet():
            self.timed(name, lambda: run_bundle(config_file=file, **overrides))

    def timed(self, name: str, action: Callable[[], T]) -> T:
        """Do something and note how long it took."""
        start = time.perf_counter()
        result = action()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        _say(f"{name}: {self.seconds[name]:.0f} s")
        return result


def _phantoms(root: Path, seed: int) -> Path:
    return make_phantom_dataset(root / "data", 12, 2, 4, seed, (64, 64, 16), (4.0, 4.0, 7.5))


def _held_out(folder: Path) -> tuple[str, list[dict[str, str]]]:
    """The section to score on and its cases: test, or validation where test cases have no labels."""
    for section in ("test", "validation"):
        cases = load_datalist(folder, section)
        if cases and all("label" in case for case in cases):
            return section, cases
    raise DataError(f"{folder} has no labelled test or validation cases to score the demo's segmentations on")


def _train(steps: Steps, folder: Path, settings: DemoSettings, effort: float, seed: int) -> None:
    """Pre-train, then teach the new class by its prompts."""
    models, logs = steps.bundle / "models", steps.bundle / "eval"
    both = {**settings.training(), "dataset_dir": str(folder), "seed": seed}
    schedule = {"epochs": 8, "epoch_length": max(1, round(40 * effort)), "val_interval": 4, "lr_schedule": "one_cycle"}
    rates = {"body_lr": 0.001, "prompt_lr": 0.005, "cpa_weight": 0.1}  # those of docs/results.md, for short trainings
    steps.bundle_run(
        "pre-training",
        "pretrain.json",
        {**both, **settings.views(), **schedule, **rates, "output_dir": str(logs / "pretrain")},
    )
    shutil.copytree(models, models / "backbone")
    tuning = {**both, "new_class": settings.new_class, "num_labelled": settings.labelled}
    tuning |= {"epochs": 8, "epoch_length": max(1, round(25 * effort)), "val_interval": 4}
    prompts = {"lr": 0.05, "prompt_init": "mean", "output_dir": str(logs / "prompt")}
    steps.bundle_run("prompt tuning", "train.json", {**tuning, **prompts})


def _segment(steps: Steps, folder: Path, settings: DemoSettings, section: str) -> None:
    """Segment the held-out volumes with all classes."""
    root = steps.bundle.parent
    both = {**settings.shared(), "dataset_dir": str(folder), "section": section}
    classes = [*settings.base_classes, settings.new_class]
    steps.bundle_run(
        "inference", "inference.json", {**both, "class_names": classes, "output_dir": str(root / "segmentations")}
    )


def _measure(steps: Steps, folder: Path, settings: DemoSettings, cases: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    root, models, new = steps.bundle.parent, steps.bundle / "models", settings.new_class
    classes = [*settings.base_classes, new]
    unchanged = base_classes_unchanged(
        models / "backbone" / "model.pt", models / "model.pt", settings.base_classes, new, [*settings.patch, 1]
    )
    adapter = inspect_adapter(models / "adapters" / f"{new}.safetensors")
    return {
        "base_classes": settings.base_classes,
        "new_class": new,
        "labelled": settings.labelled,
        "dice": dice_by_class(folder, root / "segmentations", cases, classes),
        "base_classes_unchanged": unchanged,
        "trained": adapter["values"],
        "body": parameters_of(PUNet().body).total,
        "bytes": adapter["bytes"],
        "seconds": steps.seconds,
    }


def _compare(steps: Steps, folder: Path, settings: DemoSettings, section: str, effort: float) -> Path:
    """Teach the new class again, by several methods side by side."""
    shared = {**settings.training(), "dataset_dir": str(folder), "new_class": settings.new_class}
    shared |= {"epochs": 4, "epoch_length": max(1, round(25 * effort))}
    shared |= {"pretrained_path": str(steps.bundle / "models" / "backbone" / "model.pt")}
    plan = Plan(str(steps.bundle), METHODS, (settings.labelled,), seeds=2, settings=shared, section=section)
    devices = find_devices()
    if devices == ["cpu"]:
        devices = ["cpu"] * min(4, os.cpu_count() or 1)
    title = f"Which method for {settings.new_class}?"
    _say(f"\n{', '.join(METHODS)}: {plan.seeds} trainings each, {len(devices)} at a time")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("monai_petl.compare").setLevel(logging.INFO)  # a line a run
    return steps.timed("comparison", lambda: run_plan(plan, steps.bundle.parent / "comparison", devices, title))


def _fresh_folder(root: Path) -> Path:
    """An empty folder; a former demo in it is removed, anything else is an error."""
    if root.exists() and any(root.iterdir()):
        if not (root / "bundle" / "configs" / "pretrain.json").is_file():
            raise FileExistsError(f"{root} holds something that is no demo; choose another folder with --out")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    return root


@contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars and errors stay, the bundle's log lines below WARNING go."""
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "parsing config_file")  # MONAI's, that configs are code: these are ours
            yield
    finally:
        logging.disable(logging.NOTSET)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
