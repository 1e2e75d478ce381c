"""Draws cases of a comparison side by side: image, reference and what each method found.

    python docs/figures/make_cases_figure.py results/inflation_hippocampus "frozen, center|scratch" inflation_hippocampus.png

It reads the pictures that ``compare`` keeps of the first seed's runs; commit the result only where the data's licence allows.
"""

from __future__ import annotations

from pathlib import Path

import fire
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from monai_petl.compare import Job


def main(folder: str, methods: str, target: str, shots: int | None = 3) -> None:
    """
    Args:
        folder: of the comparison.
        methods: names, separated by ``|``.
        target: the picture to write.
        shots: labelled cases; ``None`` for all.
    """
    names = methods.split("|")
    kept = {name: np.load(Path(folder) / "runs" / f"{Job('test', name, shots, 0).key}.npz") for name in names}
    first = kept[names[0]]
    count, width = len(first["names"]), len(names) + 2
    figure, axes = plt.subplots(count, width, figsize=(2.2 * width, 2.9 * count), layout="constrained", squeeze=False)
    for row in range(count):
        maps = {"image": None, "reference": first[f"label_{row}"], **{n: kept[n][f"pred_{row}"] for n in names}}
        for ax, (title, label) in zip(axes[row], maps.items(), strict=True):
            ax.imshow(first[f"image_{row}"].squeeze(), cmap="gray")
            if label is not None:
                shown = np.ma.masked_equal(label, 0)
                ax.imshow(shown, cmap="tab10", vmin=1, vmax=10, alpha=0.6, interpolation="nearest")
            ax.set_axis_off()
            ax.set_title(title if row == 0 else "", fontsize=11)
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    fire.Fire(main)
