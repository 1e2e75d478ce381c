"""Draws docs/figures/ept.png: columns of trained logits beside those of attention, and the gate that they amount to.

Run from the checkout: python docs/figures/make_ept_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from make_san_figure import arrow
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from palette import FROZEN, FROZEN_EDGE, MUTED, TRAINED, TRAINED_EDGE

OUT = Path(__file__).with_name("ept.png")
TOKENS, COLUMNS, CELL = 7, 2, 0.36


def main() -> None:
    """Write the figure."""
    figure, ax = plt.subplots(figsize=(13, 4.9), facecolor="white")
    ax.set(xlim=(0, 13), ylim=(0, 4.9), aspect="equal")
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    random = np.random.default_rng(2)
    logits = random.normal(0, 1.2, (TOKENS, TOKENS))
    prompts = np.repeat(np.linspace(-1.5, 1.8, TOKENS)[:, None], COLUMNS, 1)
    whole = np.exp(np.concatenate((prompts, logits), 1))
    weights = whole / whole.sum(1, keepdims=True)
    top, low = 3.75, 3.75 - TOKENS * CELL
    left = 0.7
    scaled = (np.concatenate((prompts, logits), 1) + 3) / 6
    matrix(ax, left, top, scaled[:, :COLUMNS], TRAINED_EDGE, TRAINED)
    matrix(ax, left + COLUMNS * CELL + 0.12, top, scaled[:, COLUMNS:], FROZEN_EDGE, FROZEN)
    ax.text(left + COLUMNS * CELL / 2, top + 0.2, "trained", fontsize=10.5, color=TRAINED_EDGE, ha="center")
    ax.text(left + 2.15, top + 0.2, "logits of a frozen attention", fontsize=10.5, color=FROZEN_EDGE, ha="center")
    ax.text(
        left - 0.15,
        low + TOKENS * CELL / 2,
        "tokens that ask",
        fontsize=10.5,
        color=MUTED,
        rotation=90,
        va="center",
        ha="right",
    )
    ax.text(left + 2.15, low - 0.3, "tokens that answer", fontsize=10.5, color=MUTED, ha="center")
    middle = top - TOKENS * CELL / 2
    arrow(ax, (4.25, middle), (5.35, middle))
    ax.text(4.8, middle + 0.15, "softmax", fontsize=10.5, color=MUTED, ha="center")
    left = 5.5
    matrix(ax, left, top, 2.2 * weights[:, COLUMNS:], FROZEN_EDGE, FROZEN)
    ax.text(left + TOKENS * CELL / 2, top + 0.2, "without the trained columns", fontsize=10.5, color=MUTED, ha="center")
    gates = weights[:, COLUMNS:].sum(1)
    ax.text(left + TOKENS * CELL + 1.0, top + 0.2, "sum of a row", fontsize=10.5, color=TRAINED_EDGE, ha="center")
    for row, gate in enumerate(gates):
        y = top - (row + 1) * CELL
        x = left + TOKENS * CELL + 0.25
        ax.add_patch(Rectangle((x, y + 0.05), 1.5, CELL - 0.1, facecolor="white", edgecolor=TRAINED_EDGE, lw=0.8))
        ax.add_patch(
            Rectangle((x, y + 0.05), 1.5 * gate, CELL - 0.1, facecolor=TRAINED, edgecolor=TRAINED_EDGE, lw=0.8)
        )
        ax.text(x + 1.6, y + CELL / 2, f"{gate:.2f}", fontsize=9.5, color=MUTED, va="center")
    ax.text(
        11.75,
        middle,
        "a gate for every\ntoken that asks:\n\nsigmoid(z - c)\n\nz from the image,\nc trained",
        fontsize=11.5,
        color=TRAINED_EDGE,
        va="center",
        ha="center",
    )
    ax.text(
        6.5,
        0.45,
        "times the frozen values: attention as before, turned down place by place",
        fontsize=11.5,
        color=MUTED,
        ha="center",
    )
    figure.savefig(OUT, dpi=130)


def matrix(ax: Axes, left: float, top: float, values: np.ndarray, edge: str, face: str) -> None:
    """Cells that are the darker the larger the value, 0 to 1."""
    for (row, column), value in np.ndenumerate(np.clip(values, 0.05, 1)):
        place = (left + column * CELL, top - (row + 1) * CELL)
        ax.add_patch(Rectangle(place, CELL, CELL, facecolor=face, edgecolor="white", lw=1))
        ax.add_patch(Rectangle(place, CELL, CELL, facecolor=edge, alpha=float(0.85 * value), edgecolor="white", lw=1))


if __name__ == "__main__":
    main()
