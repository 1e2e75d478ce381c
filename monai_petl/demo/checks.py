"""What the demo verifies: Dice of every class, and that the base classes did not move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.metrics import compute_dice

from monai_petl.data import class_names
from monai_petl.networks import PUNet, load_punet

__all__ = ["base_classes_unchanged", "dice_by_class", "read_segmentation"]


def dice_by_class(
    folder: Path, segmentations: Path, cases: Sequence[Mapping[str, str]], classes: Sequence[str]
) -> dict[str, float]:
    """Mean Dice (0 to 1) over the cases, a class each; a class that a reference does not hold is left out there.

    Args:
        folder: the data set, for the ids of its classes.
        segmentations: folder of label maps in which class k of ``classes`` (from 1) has the value k.
        cases: cases with ``image`` and ``label``.
        classes: names in the order of the values.
    """
    ids = class_names(folder)
    scores = []
    for case in cases:
        predicted, label = read_segmentation(segmentations, case["image"]), np.asarray(nib.load(case["label"]).dataobj)
        masks = [
            torch.from_numpy(np.stack([pair]).astype(np.float32))
            for pair in (
                np.stack([predicted == k for k in range(1, len(classes) + 1)]),
                np.stack([label == ids[name] for name in classes]),
            )
        ]
        scores.append(compute_dice(masks[0], masks[1], ignore_empty=True)[0].numpy())
    return {name: round(float(value), 4) for name, value in zip(classes, np.nanmean(scores, axis=0), strict=True)}


def read_segmentation(folder: Path, image: str) -> np.ndarray:
    """The label map that inference wrote for an image."""
    name = Path(image).name.removesuffix(".gz").removesuffix(".nii")
    return np.asarray(nib.load(folder / f"{name}_seg.nii.gz").dataobj)


@torch.no_grad()
def base_classes_unchanged(
    before: Path, after: Path, base_classes: Sequence[str], new_class: str, size: Sequence[int], seed: int = 0
) -> bool:
    """Whether the base classes' logits are the same bit for bit before and after the new class was learnt.

    Args:
        before, after: state dicts of the network.
        base_classes: classes of both.
        new_class: class of the second only.
        size: (H, W, D) of the images to compare on, in voxels.
        seed: seed of the images, normal noise in the range of normalised intensities.
    """
    images = torch.randn(4, 1, *size, generator=torch.Generator().manual_seed(seed))
    old = load_punet(PUNet(classes=base_classes), before).eval()(images)
    network = load_punet(PUNet(classes=[*base_classes, new_class]), after).eval()
    return torch.equal(old, network(images)[:, : len(base_classes) + 1])
