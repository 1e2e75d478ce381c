"""Bundle settings for a data set: which class is held back, and sizes that fit its volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib

from monai_petl.data import DataError, class_names, load_datalist, require_data

__all__ = ["DemoSettings", "settings_for"]

LARGEST_PATCH = 96  # voxels in plane, so that the demo stays a matter of minutes on two cores


@dataclass(frozen=True)
class DemoSettings:
    """What the demo overrides in the bundle.

    Attributes:
        base_classes, new_class: the classes of pre-training, and the one that is taught afterwards.
        spacing: voxel size (mm) that volumes are resampled to.
        patch: in-plane extent (H, W) of training patches and inference windows, in voxels.
        normalisation: ``"window"`` for CT, ``"percentile"`` for everything else.
        labelled: number of labelled volumes of the new class.
    """

    base_classes: list[str]
    new_class: str
    spacing: list[float]
    patch: tuple[int, int]
    normalisation: str
    labelled: int

    def shared(self) -> dict[str, Any]:
        """Overrides of every config."""
        return {
            "spacing": self.spacing,
            "normalisation": self.normalisation,
            "patch_size": [*self.patch, 1],
        }

    def training(self) -> dict[str, Any]:
        """Overrides of both training configs."""
        return {
            **self.shared(),
            "base_classes": self.base_classes,
            "slab_size": [*self.patch, 1],
            "cache_rate": 1.0,
            "num_workers": 0,
            "batch_size": 2,
        }

    def views(self) -> dict[str, Any]:
        """Views of the teacher and of the two students in pre-training."""
        small = [max(32, (3 * extent // 4) // 16 * 16) for extent in self.patch]
        return {"teacher_size": [*self.patch, 1], "student_sizes": [[*self.patch, 1], [*small, 1]]}


def settings_for(
    folder: Path, new_class: str | None = None, base_classes: str | Sequence[str] | None = None, labelled: int = 3
) -> DemoSettings:
    """Choose settings from the headers of a data set's images.

    Args:
        folder: data set as :func:`monai_petl.data.load_datalist` reads it.
        new_class: the class to hold back; default the last one, or ``kidney`` where there is one.
        base_classes: classes of pre-training; default all others.
        labelled: number of labelled volumes for the new class.

    Raises:
        ValueError: ``labelled`` is not positive.
        DataError: the folder holds no cases, fewer than two classes, or not the class; or its images are not NIfTI.
    """
    if labelled < 1:
        raise ValueError(f"labelled must be at least 1, got {labelled}")
    cases, names = load_datalist(folder), list(class_names(folder))
    base_classes = [base_classes] if isinstance(base_classes, str) else base_classes
    wanted = [*([new_class] if new_class else []), *(base_classes or [])]
    require_data(cases, folder, list(dict.fromkeys(wanted)))
    other = [case["image"] for case in cases if not case["image"].endswith((".nii", ".nii.gz"))]
    if other:
        raise DataError(
            f"{other[0]} is no NIfTI file, which the demo needs; convert with python -m monai_petl data make"
        )
    if len(names) < 2:
        raise DataError(
            f"{folder} has {len(names)} class; the demo needs at least two: some to pre-train on, one to teach"
        )
    new_class = new_class or ("kidney" if "kidney" in names else names[-1])
    base = [str(name) for name in base_classes or names if name != new_class]
    headers = [nib.as_closest_canonical(nib.load(case["image"])) for case in cases[:10]]
    spacing = [round(float(median(h.header.get_zooms()[axis] for h in headers)), 3) for axis in range(3)]
    extents = [max(h.shape[axis] * h.header.get_zooms()[axis] / spacing[axis] for h in headers) for axis in range(2)]
    shrink = max(1.0, max(extents) / LARGEST_PATCH)
    spacing = [round(spacing[0] * shrink, 3), round(spacing[1] * shrink, 3), spacing[2]]
    patch = (_multiple_of_16(extents[0] / shrink), _multiple_of_16(extents[1] / shrink))
    smallest = min(float(h.dataobj[..., h.shape[2] // 2].min()) for h in headers)
    return DemoSettings(
        base, new_class, spacing, patch, "window" if smallest < -200 else "percentile", min(labelled, len(cases))
    )


def _multiple_of_16(extent: float) -> int:
    return max(32, -(-int(extent) // 16) * 16)
