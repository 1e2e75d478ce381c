"""Pictures of what tuning did to tokens and features. They need matplotlib, of the extra ``report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from monai_petl.analysis.separation import principal_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_features", "plot_gates", "plot_norms"]

COLOURS = ("#4C7BA8", "#C77A0A", "#4E8F5B", "#A34A6B", "#6b7785", "#8465A8")


def plot_norms(norms: Mapping[str, Tensor]) -> Figure:
    """Norms of tokens behind every block: median, and the range that holds nine of ten.

    Args:
        norms: label, for instance ``"before"`` and ``"tuned"`` -> (L, B, N) of :func:`monai_petl.analysis.token_norms`.
    """
    from matplotlib.figure import Figure

    figure = Figure((6, 3.6), layout="constrained")
    ax = figure.subplots()
    for colour, (label, values) in zip(COLOURS, norms.items(), strict=False):
        flat = values.flatten(1).double().cpu()
        low, middle, high = (flat.quantile(q, 1).numpy() for q in (0.05, 0.5, 0.95))
        blocks = range(1, len(middle) + 1)
        ax.plot(blocks, middle, color=colour, label=label)
        ax.fill_between(blocks, low, high, color=colour, alpha=0.2, lw=0)
    ax.set(xlabel="block", ylabel="norm of a token")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def plot_gates(gates: Tensor, grid: Sequence[int]) -> Figure:
    """Mean gate of every place, a map for each block with prompts; the class token's stands above.

    Args:
        gates: (L, B, heads, N) of :func:`monai_petl.methods.attention_gates`, 2D.
        grid: rows and columns of patches.
    """
    from matplotlib.figure import Figure

    mean = gates.double().mean((1, 2)).cpu()
    places = grid[0] * grid[1]
    columns = min(len(mean), 6)
    rows = -(-len(mean) // columns)
    figure = Figure((1.7 * columns + 0.8, 1.9 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for block, (ax, values) in enumerate(zip(axes, mean, strict=False)):
        shown = ax.imshow(values[-places:].reshape(*grid).numpy(), vmin=0, vmax=1, cmap="cividis")
        token = f", class {values[0]:.2f}" if len(values) > places else ""
        ax.set_title(f"{block + 1}: {values[-places:].mean():.2f}{token}", fontsize=8)
    for ax in axes:
        ax.axis("off")
    figure.colorbar(shown, ax=list(axes), label="gate", shrink=0.8)
    return figure


def plot_features(features: Mapping[str, Tensor], labels: Tensor, class_names: Sequence[str]) -> Figure:
    """Features along their two principal axes, fitted for each entry by itself, side by side.

    Args:
        features: label -> (n, D).
        labels: (n,).
        class_names: K names.
    """
    from matplotlib.figure import Figure

    figure = Figure((3.4 * len(features), 3.5), layout="constrained")
    for ax, (label, values) in zip(figure.subplots(1, len(features), squeeze=False)[0], features.items(), strict=True):
        along = principal_axes(values).cpu()
        for number, name in enumerate(class_names):
            chosen = along[labels.cpu() == number]
            ax.plot(*chosen.T.numpy(), ".", color=COLOURS[number % len(COLOURS)], label=name, ms=4, alpha=0.7)
        ax.set_title(label, fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(class_names), frameon=False)
    return figure
