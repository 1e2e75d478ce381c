"""Draw docs/figures/methods.png: where each method adds trained tensors to one block of a frozen transformer.

python docs/figures/make_methods_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from palette import FROZEN, FROZEN_EDGE, INK, TRAINED, TRAINED_EDGE

BOX = {"boxstyle": "round,pad=0.02,rounding_size=0.06", "linewidth": 1.2}


def box(
    ax: Axes, x: float, y: float, text: str, trained: bool = False, width: float = 1.5, height: float = 0.42
) -> None:
    """A layer, centred on (x, y): amber when it trains."""
    face, edge = (TRAINED, TRAINED_EDGE) if trained else (FROZEN, FROZEN_EDGE)
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=face, edgecolor=edge, **BOX))
    ax.text(x, y, text, ha="center", va="center", fontsize=9.5, color=INK)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.3, "color": colour}
    ax.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0, **style))


def block(ax: Axes, title: str, note: str) -> None:
    """The frozen block, from the tokens below to the tokens above."""
    for y, text in ((0.3, "tokens"), (1.1, "norm"), (1.9, "q  k  v"), (2.7, "attention"), (3.4, "projection")):
        box(ax, 0, y, text)
    for y, text in ((4.7, "norm"), (5.4, "MLP"), (6.3, "tokens")):
        box(ax, 0, y, text)
    for low, high in ((0.3, 1.1), (1.1, 1.9), (1.9, 2.7), (2.7, 3.4), (3.4, 4.7), (4.7, 5.4), (5.4, 6.3)):
        arrow(ax, (0, low + 0.23), (0, high - 0.23))
    ax.set_title(title, fontsize=13, color=INK, fontweight="bold")
    ax.text(0.55, -0.5, note, ha="center", va="top", fontsize=9.5, color=INK)
    ax.set_xlim(-1.1, 2.35)
    ax.set_ylim(-1.35, 6.8)
    ax.set_axis_off()


def beside(ax: Axes, start: float, end: float, text: str, y: float | None = None) -> None:
    """A trained path to the right, from height ``start`` to height ``end``."""
    middle = (start + end) / 2 if y is None else y
    box(ax, 1.65, middle, text, trained=True, width=1.1)
    path(ax, (0.0, start), (1.65, start), (1.65, middle - 0.23))
    path(ax, (1.65, middle + 0.23), (1.65, end), (0.03, end))


def path(ax: Axes, *points: tuple[float, float]) -> None:
    """Straight lines, the last one with an arrow."""
    ax.plot(*zip(*points[:-1], strict=True), color=TRAINED_EDGE, linewidth=1.4, solid_capstyle="round")
    arrow(ax, points[-2], points[-1], TRAINED_EDGE)


def main() -> None:
    figure, axes = plt.subplots(1, 6, figsize=(17, 6.6), layout="constrained")
    lora, vpetl, aim, ffn, vpt, ssf = axes
    block(lora, "LoRA", "low-rank factors beside q and v;\nfold into the weights")
    beside(lora, 1.5, 2.35, "B A")
    block(vpetl, "V-PETL", "k and v get an addition made\nfrom the layer's input; FFN adapter")
    beside(vpetl, 1.5, 2.35, "tanh, k v")
    beside(vpetl, 5.05, 5.85, "adapter")
    block(aim, "AIM", "the same attention along depth first;\nthen in the plane; MLP adapter")
    box(aim, 1.65, 0.95, "along depth", trained=True, width=1.1)
    path(aim, (0.0, 0.6), (1.65, 0.6), (1.65, 0.72))
    path(aim, (1.65, 1.18), (1.65, 1.5), (0.9, 1.5), (0.9, 0.78), (0.03, 0.78))
    beside(aim, 3.7, 4.4, "adapter")
    beside(aim, 5.05, 5.85, "adapter")
    block(ffn, "FFN adapter", "a bottleneck\nbeside the MLP (AdaptFormer)")
    beside(ffn, 5.05, 5.85, "adapter")
    block(vpt, "VPT", "trained tokens that attention reads;\ndropped behind the block")
    box(vpt, 1.65, 0.3, "prompts", trained=True, width=1.1)
    arrow(vpt, (1.1, 0.3), (0.77, 0.3), TRAINED_EDGE)
    block(ssf, "SSF", "a scale and a shift behind every layer;\nfold into the weights")
    for y in (1.5, 2.3, 4.05, 5.05, 5.85):
        box(ssf, 1.2, y, "· a + b", trained=True, width=0.8, height=0.3)
        arrow(ssf, (0.79, y), (0.03, y), TRAINED_EDGE)
    figure.suptitle(
        "One block of a frozen transformer (blue) and what each method trains (amber); residual connections are not drawn",
        fontsize=14,
        color=INK,
    )
    figure.savefig(Path(__file__).parent / "methods.png", dpi=90)


if __name__ == "__main__":
    main()
