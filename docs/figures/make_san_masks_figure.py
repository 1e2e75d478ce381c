"""Draws docs/figures/san_masks.png: masks that a trained side network proposes, and where they make the transformer look.

    python docs/figures/make_san_masks_figure.py --data mr_hippocampus --weights dinov2_vits14.safetensors

It trains the bundle on the hippocampus, 300 steps in some ten minutes, then shows, for a test volume and each class, the mask
and the attention biases of the heads, at the patches of the transformer, relative to their mean.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import fire
import matplotlib
import torch
from monai.bundle import ConfigWorkflow
from torch import Tensor
from torch.nn import functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "san_vit_segmentation"
OUT = Path(__file__).with_name("san_masks.png")
CLASSES = ["anterior hippocampus", "posterior hippocampus"]
SIZE = [112, 154, 5]
SETTINGS: dict[str, Any] = {
    "class_names": CLASSES,
    "spacing": [0.375, 0.375, 2.0],
    "patch_size": SIZE,
    "slab_size": SIZE,
    "token_size": [14, 14, 5],
    "hidden_size": 384,
    "mlp_dim": 1536,
    "num_heads": 6,
    "attention_bias": None,
    "normalisation": "percentile",
    "affine_prob": 0.0,
    "batch_size": 1,
    "samples_per_volume": 2,
    "deep_supervision": False,
    "epochs": 4,
    "epoch_length": 75,
    "val_interval": 99,
    "lr": 1e-3,
    "num_workers": 0,
    "cache_rate": 1.0,
    "num_labelled": 20,
    "seed": 0,
}
HEADS = 3  # that are shown: those whose bias tells most of the patches apart


def main(data: str, weights: str, case: int = 0) -> None:
    """
    Args:
        data: folder of the hippocampus data set.
        weights: file of the pre-trained transformer.
        case: number of the test volume.
    """
    with tempfile.TemporaryDirectory() as folder:
        workflow = ConfigWorkflow(
            config_file=str(BUNDLE / "configs" / "train.json"),
            meta_file=str(BUNDLE / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type="train",
            bundle_root=str(BUNDLE),
            dataset_dir=data,
            pretrained_path=weights,
            ckpt_dir=f"{folder}/models",
            output_dir=f"{folder}/eval",
            **{"validate::datalist::section": "test"},
            **SETTINGS,
        )
        workflow.initialize()
        workflow.run()
        item = workflow.parser.get_parsed_content("validate::dataset")[case]
        network = workflow.parser.get_parsed_content("adapted_network").eval()
        draw(network, item["image"].as_tensor(), item["label"].as_tensor()[0])


@torch.no_grad()
def draw(network: Any, image: Tensor, label: Tensor) -> None:
    """Write the figure of the window around the slice with the most foreground."""
    slice_ = int((label > 0).sum((0, 1)).argmax())
    window, labels = (_cropped(x, slice_) for x in (image, label[None]))
    states, _, grid = network.states(window[None])
    (level,) = network.side(window[None], states)
    masks = F.interpolate(level.masks, tuple(SIZE), mode="trilinear").softmax(1)[0]
    biases = F.adaptive_max_pool3d(level.bias[0], grid)[..., 0]  # (heads, N, h, w)
    seen, reference = window[0, ..., 2], labels[0, ..., 2]
    figure, axes = plt.subplots(len(CLASSES), 2 + HEADS, figsize=(2.3 * (2 + HEADS), 6.4), layout="constrained")
    for row, name in enumerate(CLASSES, 1):
        relative = biases[:, row] - biases[:, row].mean((1, 2), keepdim=True)  # a constant changes nothing in a softmax
        strongest = relative.flatten(1).std(1).argsort(descending=True)[:HEADS]
        panels = [("reference", (reference == row).float(), "Oranges"), ("mask", masks[row, ..., 2], "Oranges")]
        panels += [(f"bias, head {int(head) + 1}", relative[head], "coolwarm") for head in strongest]
        for ax, (title, values, colours) in zip(axes[row - 1], panels, strict=True):
            ax.imshow(_upright(seen), cmap="gray")
            height, width = _upright(seen).shape
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            limit = 1.0 if colours == "Oranges" else float(values.abs().max())
            low = 0.0 if colours == "Oranges" else -limit
            ax.imshow(
                _upright(values), cmap=colours, vmin=low, vmax=limit, alpha=0.45, extent=extent, interpolation="nearest"
            )
            ax.set(xticks=[], yticks=[], title=title if row == 1 else "", **_inside(_upright(seen)))
        axes[row - 1][0].set_ylabel(name)
    figure.savefig(OUT, dpi=90)


def _cropped(volume: Tensor, slice_: int) -> Tensor:
    """The centre of a volume (C, X, Y, Z) in the plane, and the slices around one; padded where it is too small."""
    depth = range(slice_ - 2, slice_ + 3)
    volume = volume[..., [min(max(z, 0), volume.shape[-1] - 1) for z in depth]]
    for axis in (1, 2):
        missing = SIZE[axis - 1] - volume.shape[axis]
        if missing > 0:
            pad = [0, 0] * (3 - axis) + [missing // 2, missing - missing // 2]
            volume = F.pad(volume, pad, value=float(volume.min()))
        start = (volume.shape[axis] - SIZE[axis - 1]) // 2
        volume = volume.narrow(axis, start, SIZE[axis - 1])
    return volume


def _inside(image: Tensor) -> dict[str, tuple[float, float]]:
    """Limits of the axes that leave the padding out."""
    rows, columns = (torch.nonzero((image > image.min()).any(axis))[:, 0] for axis in (1, 0))
    return {"xlim": (float(columns[0]), float(columns[-1])), "ylim": (float(rows[-1]), float(rows[0]))}


def _upright(x: Tensor) -> Tensor:
    return x.flip(0, 1).T


if __name__ == "__main__":
    fire.Fire(main)
