"""Figures of the report, as SVG whose ink takes the colour of the page's text, and tiles of cases."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from PIL import Image

from monai_petl.compare.results import Results, shots_text
from monai_petl.compare.statistics import pareto_front

__all__ = ["COSTS", "class_colours", "cost_figure", "curves_figure", "shots_figure", "tile"]

INK = "#010203"  # becomes the colour of the page's text
FRONT, OTHER = "#D9822B", "#7b8794"
COLOURS = ("#4C9BE8", "#E4572E", "#57B894", "#9B6BD3", "#F2B134", "#F08FB4", "#8C6D4F", "#2BB3C0", "#7b8794", "#B5BD3A")
COSTS = {  # column: title, divisor, logarithmic
    "trained": ("trained values", 1.0, True),
    "peak_bytes": ("peak memory, MB", 1e6, False),
    "step_seconds": ("seconds a step", 1.0, False),
}
TILE = 220  # pixels of the longer side


def cost_figure(table: pd.DataFrame, column: str, metric: str) -> str:
    """Quality against one cost: a dot a method with the spread over seeds, those on the Pareto front filled.

    Args:
        table: rows of :meth:`Results.summary` for one number of labelled cases.
        column: a key of :data:`COSTS`.
        metric: name of the quality.
    """
    title, divisor, logarithmic = COSTS[column]
    table = table[table["quality"].notna() & table[column].notna()]
    cost, quality = table[column].to_numpy(float) / divisor, table["quality"].to_numpy(float)
    spread = table["spread"].fillna(0).to_numpy(float)
    front = np.asarray(pareto_front(list(cost), list(quality)), dtype=bool)
    figure, ax = _axes(4.3, 3.5)
    for on, colour, face in ((front, FRONT, FRONT), (~front, OTHER, "none")):
        style = {"ecolor": colour, "mec": colour, "mfc": face, "capsize": 2, "elinewidth": 1, "ms": 6}
        ax.errorbar(cost[on], quality[on], yerr=spread[on], fmt="o", **style)  # type: ignore[arg-type]
    order = np.argsort(cost[front])
    ax.plot(cost[front][order], quality[front][order], color=FRONT, lw=1, alpha=0.6, zorder=0)
    if logarithmic and len(cost) and cost.min() > 0:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if cost.max() > 50 * cost.min() else (1, 2, 5)))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.margins(x=0.22, y=0.12)
    ax.set(xlabel=title, ylabel=metric)
    _label(ax, list(table["method"]), cost, quality)
    return _svg(figure, column)


def shots_figure(results: Results) -> str:
    """Quality against the number of labelled cases, a line a method."""
    figure, ax = _axes(6.4, 3.6)
    table, names = results.summary(), [shots_text(shots) for shots in results.shots]
    for i, method in enumerate(results.methods):
        rows = table[table["method"] == method].set_index("shots").reindex(names)
        line = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": "os^D"[i // len(COLOURS) % 4],
            "ms": 4,
            "lw": 1.3,
            "capsize": 2,
        }
        place = np.arange(len(names)) + 0.16 * (i / max(1, len(results.methods) - 1) - 0.5)  # bars beside each other
        ax.errorbar(place, rows["quality"], yerr=rows["spread"].fillna(0), label=_plain(method), **line)  # type: ignore[arg-type]
    ax.set_xticks(range(len(names)), names)
    ax.set(xlabel="labelled cases", ylabel=results.metric)
    _legend(ax)
    return _svg(figure, "shots")


def curves_figure(results: Results, shots: int | None) -> str:
    """Training loss of every epoch, the mean over seeds, a line a method."""
    figure, ax = _axes(6.4, 3.6)
    for i, method in enumerate(results.methods):
        curves = [
            r["curve"] for r in results.records if (r["method"], r["shots"]) == (method, shots) and r.get("curve")
        ]
        if curves:
            length = min(map(len, curves))
            mean = np.mean(np.array([curve[:length] for curve in curves], dtype=float), 0)
            ax.plot(
                range(1, length + 1), mean, "o-", ms=3, lw=1.3, color=COLOURS[i % len(COLOURS)], label=_plain(method)
            )
    ax.set(xlabel="epoch", ylabel="training loss")
    ax.xaxis.get_major_locator().set_params(integer=True)
    _legend(ax)
    return _svg(figure, f"curves{shots_text(shots)}")


def class_colours(count: int) -> list[str]:
    """Colours of the classes 1, 2, ... over grey images."""
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def tile(image: np.ndarray, label: np.ndarray | None = None) -> str:
    """An image (H, W, C) of 0 to 255, with class numbers (H, W) over it, as a PNG for ``src=``."""
    picture = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
    if label is not None and label.any():
        colours = np.array([(0, 0, 0), *map(_rgb, class_colours(int(label.max())))], dtype=float)
        mixed = 0.45 * picture + 0.55 * colours[label]
        picture = np.where(label[..., None] > 0, mixed, picture).astype(np.uint8)
    scale = TILE / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    buffer = io.BytesIO()
    Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.tick_params(colors=INK, labelsize=8)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_alpha(0.5)
    ax.grid(color=INK, alpha=0.1, lw=0.7)
    return figure, ax


def _legend(ax: Axes) -> None:
    ax.legend(frameon=False, fontsize=8, labelcolor=INK, bbox_to_anchor=(1.01, 1), loc="upper left")


def _plain(name: str) -> str:
    """A name that matplotlib neither typesets as mathematics nor leaves out of a legend."""
    escaped = name.replace("$", r"\$")
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped


def _label(ax: Axes, names: Sequence[str], x: np.ndarray, y: np.ndarray) -> None:
    """Names beside their points, moved apart where they would lie on each other."""
    ax.figure.canvas.draw()
    pixels = ax.transData.transform(np.column_stack([x, y])) if len(x) else np.zeros((0, 2))
    placed: list[tuple[float, float, float]] = []
    for i in np.argsort(pixels[:, 1] if len(x) else []):
        px, py = pixels[i]
        width = 5.2 * len(names[i]) * ax.figure.dpi / 72
        while any(abs(py - qy) < 12 and px < qx + qw and qx < px + width for qx, qy, qw in placed):
            py += 2
        placed.append((px, py, width))
        offset = (7, (py - pixels[i][1]) * 72 / ax.figure.dpi - 3)
        ax.annotate(_plain(names[i]), (x[i], y[i]), offset, textcoords="offset points", fontsize=8, color=INK)


def _svg(figure: Figure, salt: str) -> str:
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S).replace(INK, "currentColor")
    style = f'role="img" style="max-width:{96 * figure.get_figwidth():.0f}px"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', style, text, count=1)


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue
