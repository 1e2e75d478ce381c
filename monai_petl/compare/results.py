"""Records of a comparison as tables: every run, and a summary of every method; what they say in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from monai_petl.compare.records import require_record, write_record
from monai_petl.compare.statistics import Difference, paired_difference
from monai_petl.files.atomic import write_text
from monai_petl.files.json_files import read_object, require_fields

__all__ = ["COLUMNS", "Results", "shots_text"]

COLUMNS = (
    "method", "shots", "seed", "status", "metric", "quality", "trained", "parameters", "file_bytes", "peak_bytes",
    "saved_bytes", "flops", "step_seconds", "seconds", "steps", "run_seconds", "factor", "device", "date", "error",
)  # fmt: skip


class Results:
    """What the runs of a comparison say.

    Args:
        plan: the plan, as in plan.json.
        records: of the scored runs; see :data:`COLUMNS`, with ``cases``, ``curve``, ``command``, ``rates`` and ``versions``.
        trials: records of the learning rates that were tried.

    Raises:
        ValueError: the runs are scored by different metrics.
    """

    def __init__(
        self, plan: Mapping[str, Any], records: Sequence[Mapping[str, Any]], trials: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.plan = plan
        self.records = list(records)
        self.trials = list(trials)
        self.methods = list(plan["methods"])
        self.shots: list[int | None] = list(plan["shots"])
        by_metric = {r["metric"]: r["method"] for r in reversed(self.records) if r.get("metric")}
        if len(by_metric) > 1:
            scored = ", ".join(f"{method} by {name}" for name, method in by_metric.items())
            raise ValueError(
                f"methods of different tasks cannot be compared: {scored}; take bundles that share a key metric"
            )
        metric = next(iter(by_metric), "quality")
        self.metric = metric.removeprefix("val_").replace("_", " ")

    def runs(self) -> pd.DataFrame:
        """A row a run, in :data:`COLUMNS`; ``shots`` is a number or ``all``."""
        rows = [{name: record.get(name) for name in COLUMNS} for record in self.records]
        return pd.DataFrame(rows, columns=list(COLUMNS)).assign(shots=[shots_text(r["shots"]) for r in self.records])

    def summary(self) -> pd.DataFrame:
        """A row for each method and number of labelled cases: mean and standard deviation over seeds, mean costs."""
        runs = self.runs()
        rows = []
        for shots in map(shots_text, self.shots):
            for method in self.methods:
                these = runs[(runs["method"] == method) & (runs["shots"] == shots)]
                done = these[these["status"] == "done"]
                row: dict[str, Any] = {"method": method, "shots": shots, "seeds": len(done)}
                row["failed"] = int((these["status"] == "failed").sum())
                values = done["quality"].astype(float)
                row["quality"] = values.mean() if len(values) else math.nan
                row["spread"] = values.std(ddof=1) if len(values) > 1 else math.nan
                for name in ("trained", "file_bytes", "peak_bytes", "saved_bytes", "flops", "step_seconds", "seconds"):
                    numbers = pd.to_numeric(done[name], errors="coerce")
                    row[name] = numbers.mean() if len(numbers) else math.nan
                factors = sorted(set(done["factor"]))
                row["factor"] = factors[0] if len(factors) == 1 else math.nan
                rows.append(row)
        return pd.DataFrame(rows)

    def metric_of(self, method: str, shots: int | None, name: str) -> dict[str, float]:
        """Mean (``quality``) and standard deviation (``spread``) over seeds of any metric of the bundle's evaluator."""
        runs = [record for record in self.records if (record["method"], record["shots"]) == (method, shots)]
        values = pd.Series([run.get("metrics", {}).get(name) for run in runs], dtype=float).dropna()
        return {"quality": values.mean(), "spread": values.std(ddof=1)}

    def difference(self, first: str, second: str, shots: int | None) -> Difference | None:
        """Paired over cases and seeds; see :func:`monai_petl.compare.statistics.paired_difference`."""
        return paired_difference(self._scores(first, shots), self._scores(second, shots))

    def advice(self, shots: int | None) -> dict[str, Any]:
        """The best method, those that the runs do not tell from it, and the one to take.

        That is the one that trains the fewest values of the best and those that tie with it and are at most the plan's
        ``margin`` behind in the mean: a tie alone may mean that too few trainings were run. Only methods take part of which as
        many trainings ended as of any other.

        Returns:
            ``best``, ``ties``, ``behind``, ``take``, ``differences`` and ``text``; where nothing was scored ``text`` alone.
        """
        table = self.summary().set_index("method")
        table = table[table["shots"] == shots_text(shots)]
        scored = table[table["quality"].notna()]
        if scored.empty:
            return {"text": "No run ended with a score, so there is nothing to advise."}
        complete = scored[scored["seeds"] == scored["seeds"].max()]
        best = complete["quality"].idxmax()
        found = {method: self.difference(best, method, shots) for method in complete.index if method != best}
        known = {method: difference for method, difference in found.items() if difference is not None}
        ties = [method for method, difference in known.items() if difference.tie]
        margin = self.plan.get("margin", 0.02)
        near = [method for method in ties if known[method].mean <= margin]
        level = complete.loc[[best, *near]]
        take = level.sort_values(["trained", "peak_bytes"], kind="stable").index[0]
        return {
            "best": best,
            "ties": ties,
            "behind": [method for method in known if method not in ties],
            "take": take,
            "differences": {m: None if d is None else asdict(d) for m, d in found.items()},
            "text": _words(table, level, best, ties, take, found, self.metric, shots, margin),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, for results.json."""
        return {
            "plan": self.plan,
            "metric": self.metric,
            "summary": json.loads(self.summary().to_json(orient="records", double_precision=10)),
            "advice": {shots_text(shots): self.advice(shots) for shots in self.shots},
            "runs": self.records,
            "trials": self.trials,
        }

    def save(self, folder: Path) -> None:
        """Write results.csv and results.json."""
        write_text(folder / "results.csv", self.runs().to_csv(index=False), "the results")
        write_record(folder / "results.json", self.to_dict())

    @classmethod
    def load(cls, file: Path) -> Results:
        """From results.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged.
        """
        remedy = "Run the comparison again"
        found = read_object(Path(file), remedy)
        require_fields(Path(file), found, {"plan": (dict,), "runs": (list,), "trials": (list,)}, remedy)
        require_fields(Path(file), found["plan"], {"methods": (dict,), "shots": (list,)}, remedy)
        for run in (*found["runs"], *found["trials"]):
            require_record(Path(file), run, remedy)
        return cls(found["plan"], found["runs"], found["trials"])

    def _scores(self, method: str, shots: int | None) -> dict[int, dict[str, float]]:
        return {
            record["seed"]: record["cases"] or {"all": record["quality"]}
            for record in self.records
            if (record["method"], record["shots"], record["status"]) == (method, shots, "done")
            and record["quality"] is not None
        }


def shots_text(shots: int | None) -> str:
    """``"3"``, or ``"all"``."""
    return "all" if shots is None else str(shots)


def _words(
    table: pd.DataFrame,
    level: pd.DataFrame,
    best: str,
    ties: list[str],
    take: str,
    found: Mapping[str, Difference | None],
    metric: str,
    shots: int | None,
    margin: float,
) -> str:
    costs, most = level.loc[take], table["seeds"].max()
    said = [
        f"With {shots_text(shots)} labelled case{'' if shots == 1 else 's'} {best} scores highest "
        f"({level.loc[best, 'quality']:.3f} {metric})."
    ]
    known = {m: d for m, d in found.items() if d is not None}
    if ties:
        said.append(f"The runs do not tell it from {_intervals(ties, known)}.")
    clear = [m for m, d in known.items() if not d.tie]
    if clear:
        said.append(f"Behind it are {_intervals(clear, known)}.")
    unknown = [m for m in found if m not in known]
    if unknown:
        said.append(f"One training and no scores by case do not compare it with {', '.join(unknown)}.")
    left = [f"{m} ({table.loc[m, 'seeds']} of {most} trainings)" for m in table.index if m not in (best, *found)]
    if left:
        said.append(f"Left out, because trainings failed or have no score: {', '.join(left)}.")
    size = f", in a file of {_bytes(costs['file_bytes'])}" if costs["file_bytes"] == costs["file_bytes"] else ""
    why = (
        f"the fewest of those within {margin:g} of the best that tie with it" if take != best else "and scores highest"
    )
    said.append(f"Take {take}: it trains {costs['trained']:,.0f} values{size}, {why}.")
    for column, what in (("peak_bytes", "memory"), ("step_seconds", "time a step")):
        least = level[column].astype(float).idxmin() if level[column].notna().any() else take
        share = level.loc[least, column] / costs[column]
        if share < 0.9:
            said.append(f"If {what} matters most, {least} needs {100 * share:.0f} % of that of {take}.")
    if len(ties) > len(level) - 1:
        said.append("More seeds would tell more of the ties apart.")
    return " ".join(said)


def _intervals(methods: Sequence[str], known: Mapping[str, Difference]) -> str:
    found = ((method, known[method]) for method in methods)
    return "; ".join(f"{m} (by {d.mean:.3f}, 95 % interval {d.low:.3f} to {d.high:.3f})" for m, d in found)


def _bytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
