"""The report of a comparison: one HTML file that opens without a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from monai_petl.compare.figures import COSTS, class_colours, cost_figure, curves_figure, shots_figure, tile
from monai_petl.compare.plan import Job
from monai_petl.compare.results import Results, shots_text
from monai_petl.files.atomic import write_text

__all__ = ["write_report"]


def write_report(
    results: Results, folder: Path, title: str | None = None, attribution: str = "", command: str = ""
) -> Path:
    """Write ``report.html``.

    Args:
        results: what the runs say.
        folder: the comparison's; its ``runs`` hold the pictures.
        title: default "Which method for BUNDLE?".
        attribution: source and licence of the images, shown under the pictures.
        command: the command line that made the comparison.

    Returns:
        The file's path.
    """
    plan, table = results.plan, results.summary()
    done = [record for record in results.records if record["status"] == "done"]
    last = next((s for s in reversed(results.shots) if any(r["shots"] == s for r in done)), results.shots[-1])
    bundle = Path(plan["bundle"]).name
    blocks = []
    for shots in results.shots:
        rows = table[table["shots"] == shots_text(shots)]
        known = rows["quality"].notna().any()
        figures = [cost_figure(rows, c, results.metric) for c in COSTS if known and rows[c].notna().any()]
        blocks.append({"shots": shots_text(shots), "rows": rows.to_dict("records"), "figures": figures})
    cases = _cases(results, folder, last)
    environment = Environment(loader=PackageLoader("monai_petl.compare", "."), autoescape=True, trim_blocks=False)
    page = environment.get_template("report.html.j2").render(
        title=title or f"Which method for {bundle}?",
        lead=_lead(results, bundle),
        plan=plan,
        metric=results.metric,
        advice=[(shots_text(shots), results.advice(shots)["text"]) for shots in results.shots],
        blocks=blocks,
        trend=[shots_figure(results)] if len(results.shots) > 1 and done else [],
        curves=[curves_figure(results, last)] if any(r.get("curve") for r in done) else [],
        curves_of=shots_text(last) if any(r.get("curve") for r in done) else "",
        tuned=bool(results.trials),
        cases=cases,
        classes=_key(results, cases),
        pictures_of=f"Trained with {shots_text(last)} labelled, the first seed.",
        attribution=attribution,
        failures=[{"run": _run_name(r), "error": r["error"]} for r in results.records if r["status"] == "failed"],
        trials=results.trials,
        method_text=_method_text(results, done),
        command=command,
        commands=_commands(done),
        circumstances=_circumstances(done),
    )
    path = folder / "report.html"
    write_text(path, page, "the report")
    return path


def _lead(results: Results, bundle: str) -> str:
    shots = ", ".join(shots_text(s) for s in results.shots)
    seeds = results.plan["seeds"]
    count = len(results.methods)
    return (
        f"{bundle}: {count} method{'s' * (count > 1)}, {shots} labelled cases, {seeds} seed{'s' * (seeds > 1)}. Scored by "
        f"{results.metric} on the {results.plan['section']} cases."
    )


def _method_text(results: Results, done: Sequence[Mapping[str, Any]]) -> str:
    said = ["Every method was trained by the bundle's own train.json in a process of its own"]
    if done:
        steps = sorted({record["steps"] for record in done})
        said[0] += f", {steps[0]} steps long" if len(steps) == 1 else f", {steps[0]} to {steps[-1]} steps long"
    said[0] += "."
    if results.trials:
        said.append(
            "The learning rates of each were the bundle's times the factor (in the table) that scored best on the validation "
            "cases, with the fewest labelled cases and the first seed, with the same budget for the search."
        )
        scored = {trial["method"] for trial in results.trials if trial["status"] == "done"}
        failed = [method for method in results.methods if method not in scored]
        if failed:
            said.append(f"No trial of {', '.join(failed)} ended; the bundle's rates were taken.")
    else:
        said.append("The learning rates were the bundle's, or those of the file of methods.")
    if done:
        memory, clock = (" or ".join(dict.fromkeys(record[name] for record in done)) for name in ("memory", "clock"))
        said.append(f"Peak memory: {memory}. Seconds a step: medians over the training, {clock}.")
    return " ".join(said)


def _circumstances(done: Sequence[Mapping[str, Any]]) -> str:
    if not done:
        return ""
    devices = ", ".join(dict.fromkeys(f"{r['device']} ({r['threads']} threads)" for r in done))
    versions = ", ".join(f"{name} {version}" for name, version in done[0]["versions"].items())
    dates = sorted({record["date"] for record in done})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    seeds = ", ".join(str(seed) for seed in sorted({record["seed"] for record in done}))
    return f"{devices}. {versions}. Seeds {seeds}. {when}."


def _commands(done: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    chosen: dict[tuple[str, int | None], Mapping[str, Any]] = {}
    for record in done:
        chosen.setdefault((record["method"], record["shots"]), record)
    return [(_run_name(record), record["command"]) for record in chosen.values() if record.get("command")]


def _run_name(record: Mapping[str, Any]) -> str:
    return f"{record['method']}, {shots_text(record['shots'])} labelled, seed {record['seed']}"


def _cases(results: Results, folder: Path, shots: int | None) -> list[dict[str, Any]]:
    """The pictured cases: the image, the reference, and what every method made of it."""
    pictures, scores = {}, {}
    for record in results.records:
        file = (
            folder
            / "runs"
            / f"{Job('test', record['method'], record['shots'], record['seed'], record['factor']).key}.npz"
        )
        if (record["shots"], record["seed"], record["status"]) == (shots, 0, "done") and file.exists():
            with np.load(file) as arrays:
                pictures[record["method"]] = dict(arrays)
            scores[record["method"]] = record["cases"]
    if not pictures:
        return []
    one = min(pictures.values(), key=len)
    return [_case(pictures, scores, i, str(one["names"][i]), results) for i in range(len(one["names"]))]


def _case(
    pictures: Mapping[str, Mapping[str, np.ndarray]],
    scores: Mapping[str, Mapping[str, float]],
    i: int,
    name: str,
    results: Results,
) -> dict[str, Any]:
    one = next(iter(pictures.values()))
    image, label = one[f"image_{i}"], one[f"label_{i}"]
    if label.ndim == 2:
        tiles = [{"title": "image", "src": tile(image)}, {"title": "reference", "src": tile(image, label)}]
        for method, arrays in pictures.items():
            score = scores[method].get(name, math.nan)
            note = f"{score:.3f}" if score == score else ""
            tiles.append({"title": method, "note": note, "src": tile(image, arrays[f"pred_{i}"])})
        return {"name": name, "tiles": tiles}
    true = int(label.argmax()) if label.size > 1 else int(label[0])
    answers = []
    for method, arrays in pictures.items():
        pred = arrays[f"pred_{i}"]
        said = int(pred.argmax()) if pred.size > 1 else int(pred[0])
        share = f" ({pred[said]:.2f})" if pred.size > 1 else ""
        answers.append({"method": method, "text": f"{_class(results, said)}{share}", "wrong": said != true})
    note = f"reference: {_class(results, true)}"
    return {"name": name, "tiles": [{"title": "image", "note": note, "src": tile(image)}], "answers": answers}


def _names(results: Results) -> list[str]:
    return next((list(r["class_names"]) for r in results.records if r.get("class_names")), [])


def _class(results: Results, number: int) -> str:
    names = _names(results)
    return names[number] if number < len(names) else str(number)


def _key(results: Results, cases: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    names = _names(results)
    return list(zip(names, class_colours(len(names)), strict=True)) if cases and "answers" not in cases[0] else []
