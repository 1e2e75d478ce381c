"""Draws the figures of docs/results.md from what the studies measured.

Run from the checkout: python docs/figures/make_results_figure.py
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from palette import FROZEN_EDGE, MUTED, TRAINED_EDGE

from monai_petl.compare import Results

FOLDER = Path(__file__).parent
STUDIES = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "quality"
FIGURES = {  # file -> title of the axes; study, labelled cases and title of every panel
    "results.png": (
        "Dice of the new class, %",
        (
            ("punet_hippocampus", 3, "MR, 3 labelled volumes"),
            ("punet_hippocampus", None, "MR, 140 labelled volumes"),
            ("punet_ct", None, "CT, one body half"),
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
        (
            ("hippocampus", 3, "Hippocampus, 3 labelled volumes"),
            ("hippocampus", None, "Hippocampus, all"),
            ("brain", 3, "Brain tissue, 3 labelled volumes"),
            ("brain", None, "Brain tissue, all"),
        ),
    ),
    "few_images_results.png": (
        "balanced accuracy, %",
        tuple(("busi", shots, f"Breast ultrasound, {shots} a class") for shots in (1, 5, 10)),
    ),
    "large_images_results.png": (
        "balanced accuracy, %",
        (("busi_large", None, "Breast ultrasound, 252 pixels, all images"),),
    ),
}


def main() -> None:
    """Write the figures."""
    for file, (axis, panels) in FIGURES.items():
        found = {name: Results.load(STUDIES / f"{name}.json") for name, _, _ in panels}
        trained = trained_values(found[panels[0][0]])
        size = (min(15, 4 + 3.5 * len(panels)), 1.2 + 0.25 * len(trained))
        figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for ax, (name, labelled, title) in zip(axes[0], panels, strict=True):
            draw(ax, found[name], labelled, trained)
            ax.set_title(title, fontsize=11)
            ax.set_xlabel(axis)
        figure.savefig(FOLDER / file, dpi=130)


def trained_values(results: Results) -> dict[str, int]:
    """Trained values of every method, the most first."""
    return {run["method"]: run["trained"] for run in sorted(results.records, key=lambda run: -run["trained"])}


def draw(ax: Axes, results: Results, labelled: int | None, trained: dict[str, int]) -> None:
    """A row a method, from few trained values (top) to many: mean, standard deviation and every seed."""
    for row, method in enumerate(trained):
        runs = [run for run in results.records if (run["method"], run["shots"]) == (method, labelled)]
        dice = [100 * run["quality"] for run in runs]
        colour = TRAINED_EDGE if method.startswith("prompt") else FROZEN_EDGE if trained[method] > 6e6 else MUTED
        ax.barh(row, mean(dice), color=colour, alpha=0.35, height=0.72)
        ax.errorbar(mean(dice), row, xerr=stdev(dice) if len(dice) > 1 else 0, fmt="o", color=colour, capsize=3, ms=5)
        ax.plot(dice, [row] * len(dice), "|", color=colour, ms=9)
    ax.set_yticks(range(len(trained)), [f"{method}  {count:,}" for method, count in trained.items()])
    ax.set_xlim(0, 100)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
