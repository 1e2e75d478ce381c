"""Draws docs/figures/san.png: what the side network of SAN reads from the frozen transformer, and what it gives back.

Run from the checkout: python docs/figures/make_san_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from palette import FROZEN, FROZEN_EDGE, INK, MUTED, TRAINED, TRAINED_EDGE

OUT = Path(__file__).with_name("san.png")
TOP, BOTTOM = 3.35, 1.25
QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")


def main() -> None:
    """Write the figure."""
    figure, ax = plt.subplots(figsize=(13, 4.6), facecolor="white")
    ax.set(xlim=(0, 13), ylim=(0, 4.6), aspect="equal")
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    box(ax, 0.75, (TOP + BOTTOM) / 2, "image", 1.0, face="white", edge=MUTED)
    for y, text, trained in ((TOP, "patches", False), (BOTTOM, "half patches\nand queries", True)):
        box(ax, 2.35, y, text, 1.35, trained=trained)
        arrow(ax, (1.25, (TOP + BOTTOM) / 2), (1.67, y))
    left = 2.35
    for number, quarter in enumerate(QUARTERS):
        x = 4.25 + 1.75 * number
        box(ax, x, TOP, quarter, 1.35)
        arrow(ax, (left + 0.68, TOP), (x - 0.68, TOP))
        if number < 3:
            box(ax, x, BOTTOM, f"block {number + 1}", 1.35, trained=True)
            arrow(ax, (left + 0.68, BOTTOM), (x - 0.68, BOTTOM))
        arrow(ax, (left + 0.84, TOP), (left + 0.84, BOTTOM + 0.02), TRAINED_EDGE)
        left = x
    last = 4.25 + 1.75 * 3
    box(ax, last, BOTTOM, "blocks 4 to 8", 1.35, trained=True)
    arrow(ax, (last - 1.07, BOTTOM), (last - 0.68, BOTTOM))
    arrow(ax, (last, BOTTOM + 0.38), (last, TOP - 0.38), TRAINED_EDGE)
    ax.text(
        last + 0.1, (TOP + BOTTOM) / 2, "attention\nbias of\neach mask", fontsize=9.5, color=TRAINED_EDGE, va="center"
    )
    box(ax, 11.75, TOP, "what is in\neach mask", 1.35, trained=True)
    box(ax, 11.75, BOTTOM, "masks", 1.35, trained=True)
    arrow(ax, (last + 0.68, TOP), (11.07, TOP))
    arrow(ax, (last + 0.68, BOTTOM), (11.07, BOTTOM))
    box(ax, 11.75, (TOP + BOTTOM) / 2, "scores", 1.0, face="white", edge=MUTED)
    for y, step in ((TOP, -0.38), (BOTTOM, 0.38)):
        arrow(ax, (11.75, y + step), (11.75, (TOP + BOTTOM) / 2 - step * 0.95))
    ax.text(2.35, 4.2, "frozen transformer", fontsize=11.5, color=FROZEN_EDGE, ha="center")
    ax.text(2.35, 0.4, "side network, trained", fontsize=11.5, color=TRAINED_EDGE, ha="center")
    ax.text(
        5.9, 0.4, "each state passes a norm and a linear layer and is added to the patches", fontsize=9.5, color=MUTED
    )
    figure.savefig(OUT, dpi=140)


def box(
    ax: Axes, x: float, y: float, text: str, width: float, trained: bool = False, face: str = "", edge: str = ""
) -> None:
    face, edge = face or (TRAINED if trained else FROZEN), edge or (TRAINED_EDGE if trained else FROZEN_EDGE)
    corner, style = (x - width / 2, y - 0.36), "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, width, 0.72, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.3))
    ax.text(x, y, text, ha="center", va="center", fontsize=10.5, color=INK)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = MUTED) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, **style))


if __name__ == "__main__":
    main()
