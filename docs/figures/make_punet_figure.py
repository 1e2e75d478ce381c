"""Draws docs/figures/punet.png: where the prompt tokens of a class enter PUNet, and what attention does with them.

Run from the checkout: python docs/figures/make_punet_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from palette import FROZEN, FROZEN_EDGE, INK, MUTED, TRAINED, TRAINED_EDGE

OUT = Path(__file__).with_name("punet.png")
TIMES = "\N{MULTIPLICATION SIGN}"
LEVELS = ((32, 112), (64, 56), (128, 28), (256, 14), (384, 7))  # channels and in-plane extent for a slice of 224 x 224
ENCODER_X, DECODER_X, BOX, CHIP = 2.6, 7.4, (2.3, 0.66), (1.35, 0.42)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 5.6), width_ratios=(1.75, 1))
    draw_network(left)
    draw_attention(right)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.02, wspace=0.02)
    figure.savefig(OUT, dpi=150, facecolor="white")


def draw_network(ax: Axes) -> None:
    ax.set_title("One frozen body, one set of tokens a class", fontsize=12, color=INK, loc="left", x=0.02)
    ax.set_xlim(-0.45, 10.6)
    ax.set_ylim(-6.6, 1.25)
    ax.set_axis_off()
    box(ax, ENCODER_X, 0.55, f"image  1 {TIMES} 224²", "white", MUTED)
    box(ax, ENCODER_X, -0.5, f"stem  32 {TIMES} 112²", FROZEN, FROZEN_EDGE)
    arrow(ax, (ENCODER_X, 0.22), (ENCODER_X, -0.17))
    for i, (channels, extent) in enumerate(LEVELS):
        y = level_y(i)
        x = ENCODER_X if i < 4 else (ENCODER_X + DECODER_X) / 2
        box(ax, x, y, f"enc{i}  {channels} {TIMES} {extent}²", FROZEN, FROZEN_EDGE)
        chip_x = x - BOX[0] / 2 - 0.28 - CHIP[0] / 2
        chip(ax, chip_x, y, f"2 {TIMES} 16 tokens")
        arrow(ax, (chip_x + CHIP[0] / 2, y), (x - BOX[0] / 2, y), TRAINED_EDGE)
        if i < 4:
            arrow(ax, (x, y + 0.67), (x, y + 0.33))
    for j in range(4):
        i = 3 - j
        channels, extent = LEVELS[i]
        y = level_y(i)
        box(ax, DECODER_X, y, f"dec{j}  {channels} {TIMES} {extent}²", FROZEN, FROZEN_EDGE)
        chip_x = DECODER_X + BOX[0] / 2 + 0.28 + CHIP[0] / 2
        chip(ax, chip_x, y, f"2 {TIMES} 16 tokens")
        arrow(ax, (chip_x - CHIP[0] / 2, y), (DECODER_X + BOX[0] / 2, y), TRAINED_EDGE)
        arrow(ax, (ENCODER_X + BOX[0] / 2, y), (DECODER_X - BOX[0] / 2, y), dashed=True)
        if j < 3:
            arrow(ax, (DECODER_X, y + 0.33), (DECODER_X, y + 0.67))
    middle = (ENCODER_X + DECODER_X) / 2
    arrow(ax, (ENCODER_X, level_y(3) - 0.33), (middle - 0.6, level_y(4) + 0.33))
    arrow(ax, (middle + 0.6, level_y(4) + 0.33), (DECODER_X, level_y(3) - 0.33))
    box(ax, DECODER_X, -0.5, "similarity head", FROZEN, FROZEN_EDGE)
    arrow(ax, (DECODER_X, level_y(0) + 0.33), (DECODER_X, -0.83))
    head_chip = DECODER_X + BOX[0] / 2 + 0.28 + CHIP[0] / 2
    chip(ax, head_chip, -0.24, "16 class tokens")
    chip(ax, head_chip, -0.76, "16 background", FROZEN, FROZEN_EDGE)
    for y in (-0.24, -0.76):
        edge = TRAINED_EDGE if y > -0.5 else FROZEN_EDGE
        arrow(ax, (head_chip - CHIP[0] / 2, y), (DECODER_X + BOX[0] / 2, y), edge)
    box(ax, DECODER_X, 0.55, f"class / background  2 {TIMES} 224²", "white", MUTED, 3.1)
    arrow(ax, (DECODER_X, -0.17), (DECODER_X, 0.22))
    ax.text(middle, level_y(0) + 0.12, "skip connections", ha="center", fontsize=8, color=MUTED)
    ax.add_patch(Rectangle((0.35, -6.45), 0.32, 0.24, facecolor=FROZEN, edgecolor=FROZEN_EDGE))
    ax.text(0.8, -6.33, "frozen body, the same for every class: 6,758,304", fontsize=9, color=INK, va="center")
    ax.add_patch(Rectangle((6.6, -6.45), 0.32, 0.24, facecolor=TRAINED, edgecolor=TRAINED_EDGE))
    ax.text(7.05, -6.33, "trained, of one class: 57,344", fontsize=9, color=INK, va="center")


def draw_attention(ax: Axes) -> None:
    """The score matrix of one window: rows are queries, columns are keys."""
    ax.set_title("Scores in one window", fontsize=12, color=INK, loc="left", x=0.02)
    ax.set_xlim(-2.0, 10.2)
    ax.set_ylim(-9.4, 2.9)
    ax.set_axis_off()
    tokens, voxels = 3, 6
    for row in range(voxels):
        for column in range(tokens + voxels):
            mine = column < tokens
            ax.add_patch(
                Rectangle(
                    (column + (0.25 if not mine else 0.0), -row - 1),
                    0.92,
                    0.92,
                    facecolor=TRAINED if mine else FROZEN,
                    edgecolor="white",
                )
            )
    ax.text(tokens / 2, 0.35, "keys: tokens\nof the class", ha="center", va="bottom", fontsize=9, color=TRAINED_EDGE)
    ax.text(
        tokens + 0.25 + voxels / 2,
        0.35,
        "keys: voxels\nof the window",
        ha="center",
        va="bottom",
        fontsize=9,
        color=FROZEN_EDGE,
    )
    ax.text(-0.35, -voxels / 2, "queries: voxels only", rotation=90, ha="right", va="center", fontsize=9, color=INK)
    ax.text(
        tokens / 2,
        -voxels - 0.35,
        "q·k + token bias\n(the same in\nevery row)",
        ha="center",
        va="top",
        fontsize=8.5,
        color=TRAINED_EDGE,
    )
    ax.text(
        tokens + 0.25 + voxels / 2,
        -voxels - 0.35,
        "q·k + relative position bias",
        ha="center",
        va="top",
        fontsize=8.5,
        color=FROZEN_EDGE,
    )
    ax.text(
        tokens + 0.25 + voxels / 2,
        -voxels - 1.15,
        "one softmax over the whole row",
        ha="center",
        va="top",
        fontsize=8.5,
        color=INK,
    )


def level_y(i: int) -> float:
    return -1.5 - i


def box(ax: Axes, x: float, y: float, text: str, face: str, edge: str, width: float = BOX[0]) -> None:
    shape = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch((x - width / 2, y - BOX[1] / 2), width, BOX[1], shape, facecolor=face, edgecolor=edge))
    ax.text(x, y, text, ha="center", va="center", fontsize=9.5, color=INK)


def chip(ax: Axes, x: float, y: float, text: str, face: str = TRAINED, edge: str = TRAINED_EDGE) -> None:
    shape = "round,pad=0,rounding_size=0.2"
    ax.add_patch(
        FancyBboxPatch((x - CHIP[0] / 2, y - CHIP[1] / 2), *CHIP, shape, facecolor=face, edgecolor=edge, linewidth=0.8)
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=7.5, color=INK)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = MUTED, dashed: bool = False
) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
    ax.annotate("", end, start, arrowprops={**style, "linestyle": ":" if dashed else "-"})


if __name__ == "__main__":
    main()
