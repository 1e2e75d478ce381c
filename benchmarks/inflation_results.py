"""Quality on real data: a vision transformer pre-trained on photographs, inflated, against random weights.

    python benchmarks/inflation_results.py train brain --data PATH --weights dinov2_vits14.safetensors --out results/brain
    python benchmarks/inflation_results.py table results/brain
    python benchmarks/inflation_results.py picture brain --data PATH --weights dinov2_vits14.safetensors --out results/brain

It runs the bundle's configs and overrides top-level ids only. Runs that are in OUT/runs.jsonl already are not repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fire
import matplotlib
import numpy as np
import quality
import torch
from monai.inferers import Inferer
from quality import Comparison, Counts, bundle_copy, prepare, run
from torch import nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUNDLE = "inflated_vit_segmentation"

SETTINGS: dict[str, dict[str, Any]] = {
    "brain": {
        "class_names": ["csf", "cortical grey matter", "white matter", "deep grey matter"],
        "spacing": [1.0, 1.0, 2.0],
        "patch_size": [182, 224, 5],
        "slab_size": [182, 224, 5],
    },
    "hippocampus": {
        "class_names": ["anterior hippocampus", "posterior hippocampus"],
        "spacing": [0.375, 0.375, 2.0],
        "patch_size": [112, 154, 5],
        "slab_size": [112, 154, 5],
    },
}
VIT_S_14 = {"token_size": [14, 14, 5], "hidden_size": 384, "mlp_dim": 1536, "num_heads": 6}
TRAINING = {
    "normalisation": "percentile",
    "epochs": 4,
    "epoch_length": 25,
    "batch_size": 2,
    "samples_per_volume": 2,
    "num_workers": 0,
    "cache_rate": 1.0,
    "sw_batch_size": 4,
    "affine_prob": 0.0,
    "lr": 2e-3,
    "backbone_lr": 1e-5,  # layer scale is folded into the weights, and Adam's steps are as long for small weights
}
ARMS: dict[str, dict[str, Any]] = {
    "frozen, center": {"method": "head"},
    "frozen, average": {"method": "head", "inflation": "average"},
    "frozen, random": {"method": "head", "pretrained_path": None},
    "full, center": {"method": "full"},
    "full, average": {"method": "full", "inflation": "average"},
    "scratch": {"method": "scratch", "backbone_lr": 5e-4},
}


def train(
    setting: str,
    data: str,
    weights: str,
    out: str,
    arms: tuple[str, ...] = tuple(ARMS),
    counts: Counts = (3,),
    seeds: tuple[int, ...] = (0, 1, 2),
    section: str = "test",
    **overrides: Any,
) -> None:
    """Train and score every arm with every number of labelled volumes and seed; appends to OUT/runs.jsonl."""
    chosen = {name: {**options, **overrides} for name, options in ARMS.items()}
    settings = settings_of(setting, weights)
    Comparison(bundle_copy(BUNDLE, out), data, settings, chosen, {}).fill(arms, counts, seeds, section)


def table(out: str) -> None:
    """Print the table of OUT/runs.jsonl in Markdown: mean ± standard deviation over the seeds."""
    quality.table(out, tuple(ARMS), ("full, center", "scratch"))


def picture(
    setting: str,
    data: str,
    weights: str,
    out: str,
    arms: tuple[str, ...] = ("frozen, center", "full, center", "scratch"),
    num_labelled: int = 3,
    cases: int = 3,
) -> None:
    """Draw OUT/picture.png: the slice with the most foreground of some test volumes, reference and prediction of each arm."""
    root, columns = bundle_copy(BUNDLE, out), {}
    for arm in arms:
        options = {**settings_of(setting, weights), **ARMS[arm], "num_labelled": num_labelled, "seed": 0}
        options |= {"ckpt_dir": str(root.parent / "pictured"), "val_interval": TRAINING["epochs"] + 1}
        run(["train.json"], root, data, options)
        scored = prepare(["train.json", "evaluate.json"], root, data, {**options, "eval_section": "test"}).parser
        dataset, network, inferer = (
            scored.get_parsed_content(f"validate::{name}" if name != "network" else name)
            for name in ("dataset", "network", "inferer")
        )
        columns[arm] = [_slices(dataset[case], network, inferer) for case in range(cases)]
    figure, axes = plt.subplots(
        cases, len(arms) + 2, figsize=(2.2 * (len(arms) + 2), 2.9 * cases), layout="constrained"
    )
    for row in range(cases):
        image, reference, _ = columns[arms[0]][row]
        labels = {"image": None, "reference": reference, **{arm: columns[arm][row][2] for arm in arms}}
        for ax, (title, label) in zip(axes[row], labels.items(), strict=True):
            ax.imshow(image.T, cmap="gray", origin="lower")
            if label is not None:
                shown = np.ma.masked_equal(label.T, 0)
                ax.imshow(shown, cmap="tab10", vmin=1, vmax=10, alpha=0.6, origin="lower", interpolation="nearest")
            ax.set_axis_off()
            ax.set_title(title if row == 0 else "", fontsize=11)
    figure.savefig(Path(out) / "picture.png", dpi=80)


def settings_of(setting: str, weights: str) -> dict[str, Any]:
    return {**SETTINGS[setting], **VIT_S_14, **TRAINING, "pretrained_path": str(Path(weights).resolve())}


@torch.no_grad()
def _slices(case: dict[str, Any], network: nn.Module, inferer: Inferer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, reference and prediction on the slice with the most foreground."""
    image, label = case["image"].as_tensor(), case["label"].as_tensor()[0]
    found = inferer(image[None], network.eval())[0].argmax(0)
    z = int((label > 0).sum((0, 1)).argmax())
    return image[0, ..., z].numpy(), label[..., z].numpy(), found[..., z].numpy()


if __name__ == "__main__":
    fire.Fire({"train": train, "table": table, "picture": picture})
