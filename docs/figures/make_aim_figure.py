"""Draws docs/figures/aim.png: which tokens each step of an AIM block brings together, and what of the block trains.

Run from the checkout: python docs/figures/make_aim_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from palette import FROZEN, FROZEN_EDGE, INK, MUTED, TRAINED, TRAINED_EDGE

OUT = Path(__file__).with_name("aim.png")
SLICES, GRID = 4, 4
STEPS = (
    ("1  along depth", "tokens of one place", "frozen attention", "adapter T"),
    ("2  in the plane", "tokens of one slice", "frozen attention", "adapter S"),
    ("3  each token", "by itself", "frozen MLP", "adapter J"),
)


def main() -> None:
    """Write the figure."""
    figure, ax = plt.subplots(figsize=(12.4, 3.7), facecolor="white")
    ax.set(xlim=(0, 12.4), ylim=(0, 3.7), aspect="equal")
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    for number, (title, who, frozen, trained) in enumerate(STEPS):
        left = 0.35 + 4.1 * number
        ax.text(left, 3.4, title, fontsize=12, color=INK)
        ax.text(left, 3.13, who, fontsize=9.5, color=MUTED)
        stack(ax, left, 1.65, number)
        draw_step(ax, left, frozen, trained, number)
        if number:
            arrow(ax, (left - 0.62, 2.35), (left - 0.12, 2.35))
    figure.savefig(OUT, dpi=150)


def stack(ax: Axes, left: float, bottom: float, step: int) -> None:
    """Slices behind each other; tokens that one token (dark) reads are marked."""
    side = 0.22
    for z in reversed(range(SLICES)):
        x0, y0 = left + 0.62 * z, bottom + 0.1 * z
        for row in range(GRID):
            for column in range(GRID):
                here = (row, column) == (2, 1)
                read = (step == 0 and here) or (step == 1 and z == 1)
                itself = here and z == 1
                colour = INK if itself else FROZEN_EDGE if read else FROZEN
                place = (x0 + side * column * 0.6, y0 + side * row + 0.06 * column)
                ax.add_patch(Rectangle(place, side * 0.6, side, facecolor=colour, edgecolor="white", linewidth=0.8))


def draw_step(ax: Axes, left: float, frozen: str, trained: str, step: int) -> None:
    """The frozen and the trained part of a step, behind each other or side by side, and the sum with the tokens."""
    target = (left + 3.2, 0.7)
    ax.text(left + 3.22, 0.7, "+", fontsize=15, color=INK, va="center")
    if step == 2:
        box(ax, (left, 0.8), 1.45, frozen, FROZEN, FROZEN_EDGE)
        box(ax, (left, 0.1), 1.45, trained, TRAINED, TRAINED_EDGE)
        arrow(ax, (left + 1.45, 1.05), target)
        arrow(ax, (left + 1.45, 0.35), target)
        return
    box(ax, (left, 0.45), 1.45, frozen, FROZEN, FROZEN_EDGE)
    box(ax, (left + 1.8, 0.45), 1.05, trained, TRAINED, TRAINED_EDGE)
    arrow(ax, (left + 1.45, 0.7), (left + 1.8, 0.7))
    arrow(ax, (left + 2.85, 0.7), target)
    if step == 1:  # past the adapter
        arrow(ax, (left + 1.2, 0.95), (left + 3.25, 0.8), "arc3,rad=-0.25")


def box(ax: Axes, corner: tuple[float, float], width: float, text: str, face: str, edge: str) -> None:
    shape = FancyBboxPatch(corner, width, 0.5, "round,pad=0,rounding_size=0.08", facecolor=face, edgecolor=edge)
    ax.add_patch(shape)
    ax.text(corner[0] + width / 2, corner[1] + 0.25, text, fontsize=9.5, color=INK, ha="center", va="center")


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: str = "arc3") -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": MUTED, "shrinkA": 1, "shrinkB": 1}
    ax.add_patch(FancyArrowPatch(start, end, connectionstyle=bend, **style))


if __name__ == "__main__":
    main()
