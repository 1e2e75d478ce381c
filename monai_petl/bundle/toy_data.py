"""Data of no meaning, in the layout that bundles read: to see whether a bundle runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from monai_petl.data.datalist import write_dataset_json

__all__ = ["make_toy_pictures", "make_toy_volumes"]

COUNTS = {"training": 4, "validation": 2, "test": 2}


def make_toy_volumes(
    folder: Path, classes: Sequence[str], size: Sequence[int] = (32, 32, 6), spacing: Sequence[float] = (8, 8, 10)
) -> Path:
    """Volumes of stripes along the first axis, one a class, as a data set in Decathlon layout.

    Args:
        folder: made where it is missing.
        classes: names of the label values 1, 2, ...
        size: in voxels. spacing: that of the bundle, in mm; the volumes' own is another one, and so is their orientation, that
            what resamples has something to do. Intensities lie between -150 and 250 (HU).
    """
    random, affine = np.random.default_rng(0), np.diag([-1.2 * spacing[0], -spacing[1], spacing[2], 1.0])
    sections: dict[str, list[dict[str, str]]] = {section: [] for section in COUNTS}
    stripes = np.arange(size[0]) * (len(classes) + 1) // size[0]
    label = np.broadcast_to(stripes[:, None, None], tuple(size)).astype(np.uint8)
    for section, count in COUNTS.items():
        part = "Ts" if section == "test" else "Tr"
        for i in range(count):
            image = -150.0 + 380.0 * (label / len(classes)) + random.normal(0, 8, size)
            case = {}
            for kind, values in (("image", image.astype(np.float32)), ("label", label)):
                name = f"{kind}s{part}/{section}_{i}.nii.gz"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(values, affine), folder / name)
                case[kind] = f"./{name}"
            sections[section].append(case)
    write_dataset_json(
        folder, sections, {name: value for value, name in enumerate(classes, 1)}, name="toy", modality="CT"
    )
    return folder


def make_toy_pictures(
    folder: Path, classes: Sequence[str], size: Sequence[int] = (40, 48), training: int = COUNTS["training"]
) -> Path:
    """Pictures of a brightness a class, as folders of classes in folders of sections; ``training`` of each to train on."""
    random = np.random.default_rng(0)
    for section, count in {**COUNTS, "training": training}.items():
        for value, name in enumerate(classes):
            (folder / section / name).mkdir(parents=True)
            for i in range(count):
                picture = random.integers(0, 40, (*size, 3)) + int(200 * value / len(classes))
                Image.fromarray(picture.astype(np.uint8)).save(folder / section / name / f"{name}_{i}.png")
    return folder
