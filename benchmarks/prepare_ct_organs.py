"""Makes a data set for transfer learning from one fully labelled abdominal CT: its two body halves.

The left half is for training, the right half, mirrored so that it has the same orientation, for scoring. Paired organs
are merged into one class. With one patient the figures say how well a method learns, not how well it generalises.

    python benchmarks/prepare_ct_organs.py PATH/ct_organs OUT
"""

from __future__ import annotations

import json
from pathlib import Path

import fire
import nibabel as nib
import numpy as np

MERGED = {
    "vertebrae": ["vertebrae"],
    "back_muscle": ["back_muscle"],
    "gluteus": ["gluteus"],
    "hip_bone": ["hip_bone"],
    "colon": ["colon"],
    "iliopsoas": ["iliopsoas"],
    "kidney": ["kidney_left", "kidney_right"],
}


def prepare(source: str, out: str) -> None:
    """Write OUT in Decathlon layout: training and validation (upper and lower part of the left half), test (right half)."""
    root, target = Path(source), Path(out)
    image = nib.load(root / "images" / "ct_abdomen.nii.gz")
    labels = np.asarray(nib.load(root / "labels" / "ct_abdomen.nii.gz").dataobj)
    names = {
        name: int(value)
        for value, name in json.loads((root / "labels.json").read_text(encoding="utf-8"))["labels"].items()
    }
    merged = np.zeros(labels.shape, np.uint8)
    for index, parts in enumerate(MERGED.values(), 1):
        merged[np.isin(labels, [names[part] for part in parts])] = index
    voxels = np.asarray(image.dataobj)
    middle = voxels.shape[0] // 2
    halves = {
        "left": (voxels[:middle], merged[:middle]),
        "right": (voxels[::-1][:middle], merged[::-1][:middle]),
    }
    for folder in ("images", "labels"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for name, (part, label) in halves.items():
        nib.save(nib.Nifti1Image(np.ascontiguousarray(part), image.affine), target / "images" / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(np.ascontiguousarray(label), image.affine), target / "labels" / f"{name}.nii.gz")
    cases = {name: [{"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}] for name in halves}
    contents = {
        "name": "CT organs, left and right body half",
        "modality": {"0": "CT"},
        "labels": {"0": "background", **{str(k): name for k, name in enumerate(MERGED, 1)}},
        "training": cases["left"],
        "validation": [],
        "test": cases["right"],
    }
    (target / "dataset.json").write_text(json.dumps(contents, indent=4) + "\n", encoding="utf-8")


if __name__ == "__main__":
    fire.Fire(prepare)
