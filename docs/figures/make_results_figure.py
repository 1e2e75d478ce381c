"""Draws results.png, inflation_results.png and methods_results.png: Dice by what is trained, from the recorded runs.

Run from the checkout: python docs/figures/make_results_figure.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from palette import FROZEN_EDGE, MUTED, TRAINED_EDGE

FOLDER = Path(__file__).parent
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FIGURES = {  # file -> title of the axes; runs, labelled volumes and title of every panel
    "results.png": (
        "Dice of the new class, %",
        (
            ("hippocampus", 3, "MR, 3 labelled volumes"),
            ("hippocampus", None, "MR, 140 labelled volumes"),
            ("ct", None, "CT, one body half"),
        ),
    ),
    "inflation_results.png": (
        "mean Dice, %",
        (
            ("inflation_hippocampus", 3, "Hippocampus, 3 labelled volumes"),
            ("inflation_brain", 3, "Brain tissue, 3 labelled volumes"),
        ),
    ),
    "methods_results.png": (
        "mean Dice, %",
        (("methods_hippocampus", 3, "Hippocampus, 3 labelled volumes: method and values that train"),),
    ),
}


def main() -> None:
    """Write the figures."""
    for file, (axis, panels) in FIGURES.items():
        height = 1.2 + 0.25 * len(variants(panels[0][0]))
        size = (min(12, 4 + 4 * len(panels)), height)
        figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for ax, (name, labelled, title) in zip(axes[0], panels, strict=True):
            draw(ax, name, labelled)
            ax.set_title(title, fontsize=11)
            ax.set_xlabel(axis)
        figure.savefig(FOLDER / file, dpi=150)


def records(name: str) -> list[dict[str, Any]]:
    """Recorded runs."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def variants(name: str) -> dict[str, int]:
    """Trained values of every variant, the most first."""
    return {run["variant"]: run["trained"] for run in sorted(records(name), key=lambda run: -run["trained"])}


def draw(ax: Axes, name: str, labelled: int | None) -> None:
    """A row a variant, from few trained values (top) to many: mean, standard deviation and every seed."""
    runs, trained = records(name), variants(name)
    for row, variant in enumerate(trained):
        dice = [100 * run["dice"] for run in runs if run["variant"] == variant and run["labelled"] == labelled]
        colour = TRAINED_EDGE if variant.startswith("prompt") else FROZEN_EDGE if trained[variant] > 6e6 else MUTED
        ax.barh(row, mean(dice), color=colour, alpha=0.35, height=0.72)
        ax.errorbar(mean(dice), row, xerr=stdev(dice) if len(dice) > 1 else 0, fmt="o", color=colour, capsize=3, ms=5)
        ax.plot(dice, [row] * len(dice), "|", color=colour, ms=9)
    ax.set_yticks(range(len(trained)), [f"{variant}  {count:,}" for variant, count in trained.items()])
    ax.set_xlim(0, 100)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
