"""Pictures of the demo: segmentations over slices, learning curves, Dice a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

__all__ = ["PALETTE", "dice_figure", "learning_curves", "overlay_figure"]

PALETTE = ("#4C9BE8", "#F2B134", "#E4572E", "#57B894", "#9B6BD3", "#F08FB4", "#8C6D4F", "#77C5D5")
INK, MUTED = "#1f2933", "#7b8794"


def overlay_figure(
    cases: Sequence[Mapping[str, str]],
    maps: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    classes: Sequence[str],
) -> Figure:
    """One row a case: the slice that shows most of the last class, then each label map over it.

    Slices are shown as radiologists do, with the patient's right on the left.

    Args:
        cases: cases with ``image``.
        maps: for each case, label maps (H, W, D) with the value k for the k-th class.
        titles: a title for each label map.
        classes: names of the values 1, 2, ...
    """
    columns = 1 + len(titles)
    figure, axes = plt.subplots(len(cases), columns, figsize=(2.6 * columns, 2.7 * len(cases) + 0.5), squeeze=False)
    colours = ListedColormap([_colour(k) for k in range(len(classes))])
    for row, (case, labels) in enumerate(zip(cases, maps, strict=True)):
        volume = nib.load(case["image"])
        canonical = nib.as_closest_canonical(volume)
        image = np.asarray(canonical.dataobj, dtype=np.float32)
        z = int(np.argmax([(labels[0][..., k] == len(classes)).sum() for k in range(labels[0].shape[2])]))
        low, high = (-200.0, 300.0) if image.min() < -200 else np.percentile(image, (1, 99))
        zooms = canonical.header.get_zooms()
        for column, ax in enumerate(axes[row]):
            shape = {"origin": "lower", "aspect": zooms[1] / zooms[0]}
            ax.imshow(image[::-1, :, z].T, cmap="gray", vmin=low, vmax=high, **shape)
            if column:
                label = np.ma.masked_equal(labels[column - 1][::-1, :, z].T, 0)
                ax.imshow(label, cmap=colours, vmin=1, vmax=len(classes), alpha=0.6, interpolation="nearest", **shape)
            if row == 0:
                ax.set_title(("image", *titles)[column], fontsize=10, color=INK)
            ax.set_axis_off()
    handles = [Patch(color=_colour(k), label=name) for k, name in enumerate(classes)]
    figure.legend(handles=handles, loc="lower center", ncol=min(len(classes), 6), frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.07, wspace=0.03, hspace=0.04)
    return figure


def learning_curves(folders: Mapping[str, Path]) -> Figure:
    """Training loss against steps on the left axis of each panel, validation Dice on the right one.

    Args:
        folders: title -> folder of TensorBoard event files.
    """
    figure, axes = plt.subplots(1, len(folders), figsize=(4 * len(folders), 2.9), squeeze=False)
    for ax, (title, folder) in zip(axes[0], folders.items(), strict=True):
        scalars = _scalars(folder)
        loss = next((curve for tag, curve in scalars.items() if tag in ("loss", "train_loss")), ([], []))
        dice = scalars.get("val_mean_dice", ([], []))
        ax.plot(loss[0], loss[1], color=MUTED, linewidth=1)
        ax.set_title(title, fontsize=10, color=INK)
        ax.set_xlabel("step", fontsize=8)
        ax.set_ylabel("training loss", fontsize=8, color=MUTED)
        ax.set_ylim(bottom=0)
        right = ax.twinx()
        steps = np.asarray(dice[0]) / max(max(dice[0], default=1), 1) * max(loss[0], default=1)
        right.plot(steps, dice[1], "o-", color=PALETTE[0], markersize=4)
        right.set_ylim(0, 1)
        right.set_ylabel("validation Dice", fontsize=8, color=PALETTE[0])
        for side in (ax, right):
            side.tick_params(labelsize=7)
            side.spines["top"].set_visible(False)
    figure.tight_layout()
    return figure


def dice_figure(scores: Mapping[str, Mapping[str, float]]) -> Figure:
    """Horizontal bars: Dice of every class, one colour a way of training.

    Args:
        scores: way of training -> class -> Dice (0 to 1).
    """
    classes = list(next(iter(scores.values())))
    figure, ax = plt.subplots(figsize=(6.4, 0.55 * len(classes) * max(len(scores), 1) * 0.6 + 1.1))
    height = 0.8 / len(scores)
    for index, (name, values) in enumerate(scores.items()):
        positions = np.arange(len(classes)) + (index - (len(scores) - 1) / 2) * height
        heights = [values.get(c, np.nan) for c in classes]
        bars = ax.barh(positions, heights, height * 0.9, color=(PALETTE[0], "#C9D3DD")[index % 2], label=name)
        ax.bar_label(bars, fmt="%.2f", fontsize=8, padding=3)
    ax.set_yticks(range(len(classes)), classes, fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.08)
    ax.set_xlabel("Dice on held-out volumes", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncol=len(scores))
    figure.tight_layout()
    return figure


def _scalars(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Curves of all event files in a folder: tag -> (steps, values)."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for file in sorted(folder.glob("events.out.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            steps, values = curves.setdefault(tag, ([], []))
            steps += [event.step for event in events.Scalars(tag)]
            values += [event.value for event in events.Scalars(tag)]
    return curves


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]
