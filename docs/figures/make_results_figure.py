"""Draws docs/figures/results.png: Dice of the new class by what is trained, from the recorded runs.

Run from the checkout: python docs/figures/make_results_figure.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OUT = Path(__file__).with_name("results.png")
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PROMPTS, OTHERS, ALL = "#C77A0A", "#6b7785", "#4C7BA8"
PANELS = (
    ("hippocampus", 3, "MR, 3 labelled volumes"),
    ("hippocampus", None, "MR, 140 labelled volumes"),
    ("ct", None, "CT, one body half"),
)


def main() -> None:
    """Write the figure."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 4.4), sharey=True, layout="constrained")
    for ax, (name, labelled, title) in zip(axes, PANELS, strict=True):
        draw(ax, name, labelled)
        ax.set_title(title, fontsize=11)
    figure.savefig(OUT, dpi=150)


def draw(ax: Axes, name: str, labelled: int | None) -> None:
    """A row a variant, from few trained values (top) to many: mean, standard deviation and every seed."""
    runs = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = {run["variant"]: run["trained"] for run in sorted(runs, key=lambda run: -run["trained"])}
    for row, variant in enumerate(trained):
        dice = [100 * run["dice"] for run in runs if run["variant"] == variant and run["labelled"] == labelled]
        colour = PROMPTS if variant.startswith("prompt") else ALL if trained[variant] > 6e6 else OTHERS
        ax.barh(row, mean(dice), color=colour, alpha=0.35, height=0.72)
        ax.errorbar(mean(dice), row, xerr=stdev(dice) if len(dice) > 1 else 0, fmt="o", color=colour, capsize=3, ms=5)
        ax.plot(dice, [row] * len(dice), "|", color=colour, ms=9)
    ax.set_yticks(range(len(trained)), [f"{variant}  {count:,}" for variant, count in trained.items()])
    ax.set_xlim(0, 100)
    ax.set_xlabel("Dice of the new class, %")
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
