"""Compare methods on a bundle: one command that tells which to take, what it costs and what it loses."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from monai_petl.compare.plan import Plan, parse_budget, parse_methods, parse_shots
from monai_petl.compare.report import write_report
from monai_petl.compare.results import Results
from monai_petl.compare.schedule import Schedule, find_devices

__all__ = ["compare", "run_plan"]


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
    margin: float = 0.02,
    title: str | None = None,
    attribution: str = "",
    **settings: Any,
) -> Path:
    """Train a bundle by several methods, with equal budgets, and write ``report.html``, ``results.csv`` and ``results.json``.

    Run again with the same ``out``, it goes on where it was interrupted, tries again what failed, and adds what is new.

    Args:
        bundle: its folder, or its train.json.
        methods: names for the bundle's id ``method``, such as ``lora,head,full``; or a JSON file of
            ``{label: {id: value}}``, in which ``bundle`` names the folder of another bundle for this method.
        out: folder for everything that is made.
        seeds: trainings of each method, with seeds 0, 1, ...
        shots: numbers of labelled cases (the bundle's ``num_labelled``), such as ``3,10,all``.
        budget: for the search of each method's learning rates: a time such as ``10min``, or a number of trials, 1 to 5.
            1 takes the bundle's rates.
        section: of the data list, whose cases are scored.
        devices: such as ``cuda:0,cuda:1`` or ``cpu,cpu``; a run at a time on each. Default: all GPUs, else the CPU.
        pictures: how many cases are drawn.
        margin: what a smaller method that ties with the best may lie behind it in the mean, to be advised in its place.
        title: of the report.
        attribution: source and licence of the images, shown under the pictures.
        settings: any top-level ids of the bundle, such as ``dataset_dir`` and ``epochs``.

    Returns:
        The report's path.

    Raises:
        FileNotFoundError: there is no such bundle.
        ValueError: an argument is out of range, ``out`` holds another comparison, or runs failed: when some did, the report
            of the others is written first; when all did, there is none.
    """
    root = _bundle(bundle)
    trials, seconds = parse_budget(budget)
    arms = {
        name: {**ids, "bundle": str(_bundle(ids["bundle"]))} if "bundle" in ids else ids
        for name, ids in parse_methods(methods).items()
    }
    plan = Plan(
        bundle=str(root),
        methods=arms,
        shots=parse_shots(shots),
        seeds=seeds,
        trials=trials,
        seconds=seconds,
        settings=_absolute(settings),
        section=section,
        pictures=pictures,
        margin=margin,
    )
    for name in plan.methods:
        _check_ids(Path(plan.bundle_of(name)), plan.ids_of(name))
    command = _command(
        bundle, methods, settings, seeds=seeds, shots=shots, budget=budget, section=section, margin=margin, out=out
    )
    report = run_plan(plan, Path(out), find_devices(devices), title, attribution, command)
    _require_all(Results.load(report.with_name("results.json")).records, report)
    return report


def run_plan(
    plan: Plan,
    folder: Path,
    devices: Sequence[str],
    title: str | None = None,
    attribution: str = "",
    command: str = "",
) -> Path:
    """Run what is missing of a plan and write its results and its report; returns the report's path.

    Args:
        plan: what to run.
        folder: for everything that is made.
        devices: see :func:`find_devices`.
        title, attribution: see :func:`compare`.
        command: the command line, for the report.

    Raises:
        ValueError: every run failed; gives the first reason.
    """
    folder = folder.resolve()
    plan.save(folder)
    schedule = Schedule(plan, folder, devices)
    records = schedule.run()
    if not any(record["status"] == "done" for record in records):
        raise ValueError(f"all {len(records)} runs failed: {_reason(records[0])}. Their logs are in {folder / 'runs'}")
    results = Results(plan.to_dict(), records, schedule.trials() if plan.trials > 1 else ())
    results.save(folder)
    return write_report(results, folder, title, attribution, command)


def _require_all(records: Sequence[Mapping[str, Any]], report: Path) -> None:
    failed = [record for record in records if record["status"] != "done"]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(records)} runs failed, first {_reason(failed[0])}. The others are in {report}; the same "
            "command tries the failed ones again"
        )


def _reason(record: Mapping[str, Any]) -> str:
    return f"{record['method']} with seed {record['seed']}: {record.get('error') or 'no reason was given'}"


def _bundle(path: str) -> Path:
    """The folder of a bundle, from itself or from its train.json."""
    root = Path(path).resolve()
    root = root.parent.parent if root.name == "train.json" else root
    if not (root / "configs" / "train.json").is_file():
        raise FileNotFoundError(f"no bundle at {path}: it has no configs/train.json")
    return root


def _check_ids(root: Path, ids: Mapping[str, Any]) -> None:
    parser = ConfigParser()
    parser.read_config(str(root / "configs" / "train.json"))
    known = [name for name in parser.get() if name != "_meta_"]
    unknown = [name for name in ids if name.split("::")[0] not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; its ids are: {', '.join(known)}"
        raise ValueError(f"{root.name} has no id {unknown[0]!r}{hint}")


def _absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With whole paths, so that the same command from another folder is not taken for the same comparison."""
    paths = {n: Path(v) for n, v in settings.items() if isinstance(v, str) and n.endswith(("_dir", "_path"))}
    return {**settings, **{name: str(path.resolve()) for name, path in paths.items() if path.exists()}}


def _command(bundle: str, methods: Any, settings: Mapping[str, Any], **options: Any) -> str:
    names = methods if isinstance(methods, str) else ",".join(methods)
    words = ["python", "-m", "monai_petl", "compare", bundle, "--methods", names]
    for name, value in {**options, **settings}.items():
        words += [f"--{name}", value if isinstance(value, str) else repr(value)]
    return " ".join(map(shlex.quote, words))
