"""Draws docs/figures/inflation.png: a 2D kernel as a 3D kernel by both modes, and the network of the bundle on a phantom.

Run from the checkout: python docs/figures/make_inflation_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from palette import FROZEN, FROZEN_EDGE, INK, MUTED, TRAINED, TRAINED_EDGE

from monai_petl.data.phantom import make_phantom
from monai_petl.inflation import inflate_kernel

OUT = Path(__file__).with_name("inflation.png")
SLICES, WIDTH, HEIGHT = 5, 12.4, 3.9


def main() -> None:
    """Write the figure."""
    figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    draw_kernels(figure, 0.02, 0.36)
    draw_network(figure, 0.415)
    figure.savefig(OUT, dpi=150)


def draw_kernels(figure: plt.Figure, left: float, width: float) -> None:
    """A kernel of the patch embedding, and its five depth planes by each mode."""
    y, x = torch.meshgrid(*[torch.linspace(-2, 2, 16)] * 2, indexing="ij")
    kernel = torch.exp(-(x**2 + y**2) / 2) * torch.cos(2.4 * (x + y))
    deep = {mode: inflate_kernel(kernel[None, None], SLICES, mode)[0, 0] for mode in ("center", "average")}
    side = width / (SLICES + 1.6)
    rows = {"center": 0.56, "average": 0.13}
    figure.text(left, 0.93, "The kernel gets a depth of five slices", fontsize=12, color=INK)
    picture(figure, left, 0.345, side, kernel, "2D kernel")
    for mode, bottom in rows.items():
        first = left + 1.6 * side
        for z in range(SLICES):
            picture(figure, first + z * side, bottom, side, deep[mode][..., z], "")
        figure.text(first, bottom + side * WIDTH / HEIGHT, mode, fontsize=10, color=INK)
        text = "0, 0, kernel, 0, 0" if mode == "center" else "a fifth of the kernel on every slice"
        figure.text(first + 0.09 * width * 2, bottom + side * WIDTH / HEIGHT, text, fontsize=9, color=MUTED)
    figure.text(left + 1.6 * side, 0.05, "the sum over depth is the 2D kernel in both", fontsize=9, color=MUTED)


def picture(figure: plt.Figure, left: float, bottom: float, side: float, image: torch.Tensor, title: str) -> None:
    """A plane of a kernel; grey is zero."""
    ax = figure.add_axes((left, bottom, side * 0.92, side * 0.92 * WIDTH / HEIGHT))
    ax.imshow(image, cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=9, color=MUTED)


def draw_network(figure: plt.Figure, left: float) -> None:
    """Window of slices, transformer, decoder, labels of the centre slice."""
    image, label, _ = make_phantom(3, (192, 192, 40), (1.8, 1.8, 3.0))
    around = slice(18, 18 + SLICES)
    image, label = np.clip(image[..., around], -175, 250), label[..., around][..., SLICES // 2]
    figure.text(left, 0.93, "Five slices in, the labels of the centre one out", fontsize=12, color=INK)
    for z in reversed(range(SLICES)):
        ax = figure.add_axes((left + 0.014 * z, 0.22 + 0.04 * z, 0.12, 0.12 * WIDTH / HEIGHT))
        ax.imshow(image[..., z].T, cmap="gray", origin="lower")
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_color(TRAINED_EDGE if z == SLICES // 2 else "white")
            spine.set_linewidth(2 if z == SLICES // 2 else 1)
    ax = figure.add_axes((left + 0.21, 0.0, 0.22, 0.92))
    ax.set_xlim(0, 10)
    ax.set_ylim(0, 10)
    ax.set_axis_off()
    box(ax, 0.6, 7.4, "16 \N{MULTIPLICATION SIGN} 16 \N{MULTIPLICATION SIGN} 5 voxels", FROZEN, FROZEN_EDGE)
    ax.add_patch(FancyArrowPatch((2.95, 7.3), (2.95, 6.9), arrowstyle="-|>", mutation_scale=9, color=MUTED))
    for block, y in (("blocks 1 to 3", 5.9), ("blocks 4 to 6", 4.7), ("blocks 7 to 9", 3.5), ("blocks 10 to 12", 2.3)):
        box(ax, 0.6, y, block, FROZEN, FROZEN_EDGE)
        ax.add_patch(FancyArrowPatch((5.4, y + 0.45), (7.2, y + 0.45), arrowstyle="-|>", mutation_scale=9, color=MUTED))
    ax.add_patch(FancyBboxPatch((7.3, 2.3), 2.4, 6.0, boxstyle="round,pad=0.1", fc=TRAINED, ec=TRAINED_EDGE))
    ax.text(8.5, 5.3, "decoder", rotation=90, ha="center", va="center", fontsize=10, color=INK)
    ax.text(0.6, 0.9, "frozen, inflated from 2D", fontsize=9, color=FROZEN_EDGE)
    ax.text(9.7, 0.9, "trained", fontsize=9, color=TRAINED_EDGE, ha="right")
    for x in (left + 0.2, left + 0.437):
        figure.text(x, 0.5, "\N{RIGHTWARDS ARROW}", fontsize=16, color=MUTED, ha="center")
    ax = figure.add_axes((left + 0.452, 0.32, 0.13, 0.13 * WIDTH / HEIGHT))
    ax.imshow(image[..., SLICES // 2].T, cmap="gray", origin="lower")
    colours = ListedColormap(plt.get_cmap("tab10").colors[:9])
    ax.imshow(np.ma.masked_equal(label.T, 0), cmap=colours, vmin=1, vmax=9, alpha=0.6, origin="lower")
    ax.set_xticks([])
    ax.set_yticks([])


def box(ax: Axes, x: float, y: float, text: str, face: str, edge: str) -> None:
    """A part of the network."""
    ax.add_patch(FancyBboxPatch((x, y), 4.7, 0.9, boxstyle="round,pad=0.05", fc=face, ec=edge))
    ax.text(x + 2.35, y + 0.45, text, ha="center", va="center", fontsize=9, color=INK)


if __name__ == "__main__":
    main()
