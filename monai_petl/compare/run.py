"""Compare methods on a bundle: one command that tells which to take, what it costs and what it loses."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_petl.compare.plan import Plan, parse_budget, parse_methods, parse_shots
from monai_petl.compare.report import write_report
from monai_petl.compare.results import Results
from monai_petl.compare.schedule import Schedule, find_devices

__all__ = ["compare", "run_plan"]

logger = logging.getLogger(__name__)


def compare(
    bundle: str,
    methods: Any,
    out: str = "comparison",
    seeds: int = 3,
    shots: Any = "all",
    budget: Any = 1,
    section: str = "test",
    devices: str | Sequence[str] | None = None,
    pictures: int = 3,
    title: str | None = None,
    attribution: str = "",
    **settings: Any,
) -> Path:
    """Train a bundle by several methods, with equal budgets, and write ``report.html``, ``results.csv`` and ``results.json``.

    Run again with the same ``out``, it goes on where it was interrupted, tries again what failed, and adds what is new.

    Args:
        bundle: its folder, or its train.json.
        methods: names for the bundle's id ``method``, such as ``lora,head,full``; or a JSON file of
            ``{label: {id: value}}``.
        out: folder for everything that is made.
        seeds: trainings of each method, with seeds 0, 1, ...
        shots: numbers of labelled cases (the bundle's ``num_labelled``), such as ``3,10,all``.
        budget: for the search of each method's learning rates: a time such as ``10min``, or a number of trials, 1 to 5.
            1 takes the bundle's rates.
        section: of the data list, whose cases are scored.
        devices: such as ``cuda:0,cuda:1`` or ``cpu,cpu``; a run at a time on each. Default: all GPUs, else the CPU.
        pictures: how many cases are drawn.
        title: of the report.
        attribution: source and licence of the images, shown under the pictures.
        settings: any top-level ids of the bundle, such as ``dataset_dir`` and ``epochs``.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: there is no such bundle.
        ValueError: an argument is out of range, or ``out`` holds another comparison.
    """
    root = Path(bundle).resolve()
    root = root.parent.parent if root.name == "train.json" else root
    if not (root / "configs" / "train.json").is_file():
        raise FileNotFoundError(f"no bundle at {bundle}: it has no configs/train.json")
    trials, seconds = parse_budget(budget)
    plan = Plan(
        bundle=str(root),
        methods=parse_methods(methods),
        shots=parse_shots(shots),
        seeds=seeds,
        trials=trials,
        seconds=seconds,
        settings=_absolute(settings),
        section=section,
        pictures=pictures,
    )
    return run_plan(plan, Path(out), find_devices(devices), title, attribution)


def run_plan(plan: Plan, folder: Path, devices: Sequence[str], title: str | None = None, attribution: str = "") -> Path:
    """Run what is missing of a plan and write its results and its report; returns the report's path."""
    folder = folder.resolve()
    plan.save(folder)
    schedule = Schedule(plan, folder, devices)
    records = schedule.run()
    results = Results(plan.to_dict(), records, schedule.trials() if plan.trials > 1 else ())
    results.save(folder)
    command = " ".join(map(shlex.quote, ["python", "-m", "monai_petl", *sys.argv[1:]]))
    return write_report(results, folder, title, attribution, command)


def _absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Paths that exist, from wherever the command was given: the runs work in the same directory, the report may not."""
    paths = {n: Path(v) for n, v in settings.items() if isinstance(v, str) and "/" in v}
    return {**settings, **{name: str(path.resolve()) for name, path in paths.items() if path.exists()}}
