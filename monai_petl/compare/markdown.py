"""A comparison as a table in Markdown, for pages and model cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from monai_petl.compare.results import Results, shots_text

__all__ = ["markdown_table"]

COSTS = (  # of Results.summary(): title, unit and form
    ("step_seconds", "s a step", 1, ".2f"),
    ("peak_bytes", "peak, MB", 1e6, ",.0f"),
    ("saved_bytes", "kept, MB", 1e6, ",.0f"),
    ("file_bytes", "file, MB", 1e6, ",.1f"),
)


def markdown_table(results: Results, percent: bool = True, also: Sequence[str] = ()) -> str:
    """A row a method: quality with every number of labelled cases as mean ± standard deviation over seeds, and the costs.

    Args:
        results: what the runs say.
        percent: qualities times 100.
        also: names of other metrics that the bundle's evaluator computes, such as ``val_auc``.

    Returns:
        Lines without one at the end; what was not measured is a dash, and a cost that no run measured has no column.
    """
    table, shots = results.summary(), [shots_text(count) for count in results.shots]
    more = [(name, count) for name in also for count in results.shots]
    costs = [column for column in COSTS if table[column[0]].notna().any()]
    head = ["method", "trained", *(f"{name} labelled" for name in shots)]
    head += [f"{name.removeprefix('val_')}, {shots_text(count)} labelled" for name, count in more]
    head += [title for _, title, _, _ in costs]
    lines = [f"| {' | '.join(head)} |", f"| --- {'| ---: ' * (len(head) - 1)}|"]
    for method in results.methods:
        rows = table[table["method"] == method].set_index("shots")
        cells = [f"`{method}`", _number(rows["trained"].mean(), ",.0f")]
        cells += [_score(dict(rows.loc[name]), 100 if percent else 1) for name in shots]
        cells += [_score(results.metric_of(method, count, name), 100 if percent else 1) for name, count in more]
        cells += [_number(rows[name].mean() / unit, form) for name, _, unit, form in costs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _score(row: Mapping[str, float], scale: int) -> str:
    digits = ".1f" if scale == 100 else ".3f"
    if row["quality"] != row["quality"]:
        return "-"
    spread = f" ± {scale * row['spread']:{digits}}" if row["spread"] == row["spread"] else ""
    return f"{scale * row['quality']:{digits}}{spread}"


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if value == value else "-"
