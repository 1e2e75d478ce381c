"""Draws docs/figures/fpt.png: what FPT keeps of a frozen transformer that sees the large image, and who reads it.

Run from the checkout: python docs/figures/make_fpt_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from make_san_figure import arrow, box
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from palette import FROZEN, FROZEN_EDGE, MUTED, TRAINED_EDGE

OUT = Path(__file__).with_name("fpt.png")
TOP, MIDDLE, BOTTOM = 4.05, 2.55, 1.05


def main() -> None:
    """Write the figure."""
    figure, ax = plt.subplots(figsize=(13, 5.2), facecolor="white")
    ax.set(xlim=(0, 13), ylim=(0, 5.2), aspect="equal")
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    tokens(ax, 0.45, TOP - 0.6, 12, 1.2, 0.2)
    tokens(ax, 0.8, BOTTOM - 0.25, 4, 0.5, 0.0)
    ax.text(1.05, TOP + 0.85, "image, 512 pixels", fontsize=10.5, color=MUTED, ha="center")
    ax.text(1.05, BOTTOM - 0.6, "the same, 128 pixels", fontsize=10.5, color=MUTED, ha="center")
    left = 2.2
    for number in range(3):
        x = 3.6 + 2.6 * number
        box(ax, x, TOP, f"frozen block {7 + number}", 1.6)
        box(ax, x, MIDDLE, "prompts attend\nto what is kept", 1.6, trained=True)
        box(ax, x, BOTTOM, f"block {1 + number}", 1.6, trained=True)
        arrow(ax, (left - 0.3 if number == 0 else left + 0.05, TOP), (x - 0.8, TOP))
        arrow(ax, (left - 0.6 if number == 0 else left + 0.05, BOTTOM), (x - 0.8, BOTTOM))
        arrow(ax, (x, TOP - 0.36), (x, MIDDLE + 0.36), FROZEN_EDGE)
        arrow(ax, (x, MIDDLE - 0.36), (x, BOTTOM + 0.36), TRAINED_EDGE)
        ax.text(
            x + 0.1,
            (TOP + MIDDLE) / 2,
            "keys and values of\na fifth of the tokens",
            fontsize=8.5,
            color=FROZEN_EDGE,
            va="center",
        )
        left = x + 0.75
    arrow(ax, (left + 0.05, BOTTOM), (left + 0.75, BOTTOM))
    ax.text(left + 0.85, BOTTOM, "...", fontsize=14, color=MUTED, va="center")
    arrow(ax, (left + 1.15, BOTTOM), (left + 1.75, BOTTOM))
    box(ax, left + 2.45, BOTTOM, "class", 1.3, trained=True)
    ax.text(left + 0.4, TOP, "computed once,\ncan be stored", fontsize=10.5, color=FROZEN_EDGE, va="center")
    ax.text(
        left + 0.4, MIDDLE, "trained: 1 % of the\ntransformer's size", fontsize=10.5, color=TRAINED_EDGE, va="center"
    )
    figure.savefig(OUT, dpi=130)


def tokens(ax: Axes, x: float, y: float, count: int, size: float, kept: float) -> None:
    """An image of count x count patches, of which a share is marked."""
    chosen = np.random.default_rng(1).random((count, count)) < kept
    side = size / count
    for row in range(count):
        for column in range(count):
            colour = FROZEN_EDGE if chosen[row, column] else FROZEN
            place = (x + column * side, y + row * side)
            ax.add_patch(Rectangle(place, side, side, facecolor=colour, edgecolor="white", linewidth=0.6))


if __name__ == "__main__":
    main()
