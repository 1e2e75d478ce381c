"""Randomly augmented views of one image slab: students and a teacher for pre-training, a single one for training.

Intensity changes come from MONAI. The in-plane affine is resampled here, together with the crop: one pass over the
voxels that are kept, image and coordinates at once, about ten times faster than `RandAffined` followed by
`RandSpatialCropd`.

Reference: Fischer et al., "Prompt Tuning for Parameter-efficient Medical Image Segmentation", 2022, arXiv 2211.09233;
probabilities and ranges as in its published code.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    Identity,
    OneOf,
    RandAdjustContrast,
    RandBiasField,
    RandCoarseDropout,
    RandCoarseShuffle,
    RandHistogramShift,
    Randomizable,
    RandStdShiftIntensity,
    Transform,
)
from monai.transforms.utils import create_rotate, create_scale, create_shear
from torch import Tensor

__all__ = ["RandViewd", "StudentTeacherViewsd", "ViewAugmentation"]


@dataclass(frozen=True, kw_only=True)
class ViewAugmentation:
    """How strongly, and how often, a view is changed. The defaults are a student's; `teacher()` gives a teacher's."""

    mask_prob: float = 0.1
    """of each of: dropping 1-3 boxes of 5-20 voxels, dropping all but 6 boxes of 48-96, shuffling 1-3 boxes of 5-20"""
    intensity_prob: float = 0.1
    """of each of: bias field, standard-deviation shift, contrast (gamma), histogram shift"""
    std_shift: float = 0.25
    """largest shift of the intensities, in standard deviations"""
    control_points: int | tuple[int, int] = (8, 12)
    """number, or range of the number, of control points of the histogram shift"""
    affine_prob: float = 0.8
    rotate: float = 0.4
    """largest in-plane rotation, rad"""
    shear: float = 0.025
    """largest in-plane shear"""
    scale: float = 0.25
    """largest deviation of the in-plane scales from 1"""

    def __post_init__(self) -> None:
        if not 0 <= 3 * self.mask_prob <= 1:
            raise ValueError(f"mask_prob is for each of three masks and must be in [0, 1/3], got {self.mask_prob}")
        for name in ("intensity_prob", "affine_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.scale < 1:
            raise ValueError(f"scale is the largest deviation from 1 and must be in [0, 1), got {self.scale}")

    @classmethod
    def teacher(cls) -> ViewAugmentation:
        """Milder: never masked, intensities and size change less, half of the views keep their geometry."""
        return cls(mask_prob=0.0, std_shift=0.1, control_points=12, affine_prob=0.5, scale=0.1)

    def intensity_transform(self) -> Compose:
        """The random intensity changes of an image (C, H, W, D)."""
        boxes = {"holes": 1, "max_holes": 3, "spatial_size": 5, "max_spatial_size": 20}
        masks = OneOf(
            [
                Identity(),
                RandCoarseDropout(**boxes, prob=1.0),
                RandCoarseDropout(holes=6, spatial_size=48, max_spatial_size=96, dropout_holes=False, prob=1.0),
                RandCoarseShuffle(**boxes, prob=1.0),
            ],
            weights=[1 - 3 * self.mask_prob, self.mask_prob, self.mask_prob, self.mask_prob],
        )
        changes = [
            RandBiasField(prob=self.intensity_prob),
            RandStdShiftIntensity((0.0, self.std_shift), prob=self.intensity_prob),
            RandAdjustContrast(prob=self.intensity_prob),
            RandHistogramShift(self.control_points, prob=self.intensity_prob),
        ]
        return Compose([masks, *changes] if self.mask_prob else changes)


class StudentTeacherViewsd(Randomizable, Transform):
    """Replaces a slab by independently augmented student views and one teacher view of it.

    Reads `image` (C, H, W, D), `coords` (3, H, W, D) and, when present, `label` (1, H, W, D); writes
    `student<i>_image`, `student<i>_coords`, `student<i>_label` for i = 0, 1, ... and `teacher_image`, `teacher_coords`.
    The slab itself is dropped and every other key is kept. Views are plain tensors. A view larger than the slab is
    padded by reflection.

    Args:
        student_sizes: (H, W, D) of each student view, in voxels.
        teacher_size: (H, W, D) of the teacher view, in voxels.
        student: augmentation of the students.
        teacher: augmentation of the teacher, by default `ViewAugmentation.teacher()`.
        image_key, label_key, coords_key: where the slab is read from.

    Raises:
        ValueError: a size has not three positive numbers, or there is no student.
        KeyError: the slab has no image or no coordinates.

    Example::

        StudentTeacherViewsd(student_sizes=[(224, 224, 1), (160, 160, 1)], teacher_size=(256, 256, 1))
    """

    def __init__(
        self,
        student_sizes: Sequence[Sequence[int]],
        teacher_size: Sequence[int],
        student: ViewAugmentation | None = None,
        teacher: ViewAugmentation | None = None,
        image_key: Hashable = "image",
        label_key: Hashable = "label",
        coords_key: Hashable = "coords",
    ) -> None:
        if not student_sizes:
            raise ValueError("student_sizes must name at least one size (H, W, D), got none")
        self.students = [_RandView(size, student or ViewAugmentation()) for size in student_sizes]
        self.teacher = _RandView(teacher_size, teacher or ViewAugmentation.teacher())
        self.image_key = image_key
        self.label_key = label_key
        self.coords_key = coords_key

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> StudentTeacherViewsd:
        super().set_random_state(seed, state)
        for view in (*self.students, self.teacher):
            view.set_random_state(state=self.R)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        slab_keys = (self.image_key, self.label_key, self.coords_key)
        image, coords, label = data[self.image_key], data[self.coords_key], data.get(self.label_key)
        result = {key: value for key, value in data.items() if key not in slab_keys}
        for index, view in enumerate(self.students):
            student_image, student_label, student_coords = view(image, label, coords)
            result[f"student{index}_image"] = student_image
            result[f"student{index}_coords"] = student_coords
            if student_label is not None:
                result[f"student{index}_label"] = student_label
        result["teacher_image"], _, result["teacher_coords"] = self.teacher(image, None, coords)
        return result


class RandViewd(Randomizable, Transform):
    """Replaces `image` (C, H, W, D) and, when present, `label` (1, H, W, D) by one augmented view, a student's.

    For training without a teacher, with the keys that `SupervisedTrainer` reads.

    Args:
        size: (H, W, D) of the view, in voxels; padded by reflection where the image is smaller.
        augmentation: by default `ViewAugmentation()`.
        image_key, label_key: what is replaced.

    Raises:
        ValueError: `size` has not three positive numbers.
    """

    def __init__(
        self,
        size: Sequence[int],
        augmentation: ViewAugmentation | None = None,
        image_key: Hashable = "image",
        label_key: Hashable = "label",
    ) -> None:
        self.view = _RandView(size, augmentation or ViewAugmentation())
        self.image_key = image_key
        self.label_key = label_key

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandViewd:
        super().set_random_state(seed, state)
        self.view.set_random_state(state=self.R)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        result[self.image_key], label, _ = self.view(data[self.image_key], data.get(self.label_key), None)
        if label is not None:
            result[self.label_key] = label
        return result


class _RandView(Randomizable):
    """One random view: intensity changes, then affine and crop in one resampling, then padding."""

    def __init__(self, size: Sequence[int], augmentation: ViewAugmentation) -> None:
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"the size of a view must be three positive numbers (H, W, D), got {list(size)}")
        self.size = tuple(size)
        self.augmentation = augmentation
        self.intensity = augmentation.intensity_transform()

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> _RandView:
        super().set_random_state(seed, state)
        self.intensity.set_random_state(state=self.R)
        return self

    def __call__(
        self, image: Tensor, label: Tensor | None, coords: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        image, label, coords = (_plain(data) for data in (image, label, coords))
        # cloned, because some of MONAI's intensity transforms write into the image that they are given
        image = _plain(self.intensity(image.clone()))
        continuous = image if coords is None else torch.cat([image, coords])

        extents = image.shape[1:]
        kept = [min(view, slab) for view, slab in zip(self.size, extents, strict=True)]
        starts = [self.R.randint(slab - size + 1) for slab, size in zip(extents, kept, strict=True)]
        if self.R.random_sample() < self.augmentation.affine_prob:
            grid = self._affine_grid(extents, starts, kept)
            depth = slice(starts[2], starts[2] + kept[2])
            continuous = _resample_in_plane(continuous[..., depth], grid, "bilinear")
            label = None if label is None else _resample_in_plane(label[..., depth], grid, "nearest")
        else:
            box = (slice(None), *(slice(start, start + size) for start, size in zip(starts, kept, strict=True)))
            continuous = continuous[box]
            label = None if label is None else label[box]

        continuous = _reflect_pad(continuous, self.size)
        channels = image.shape[0]
        return (
            continuous[:channels],
            None if label is None else _reflect_pad(label, self.size),
            None if coords is None else continuous[channels:],
        )

    def _affine_grid(self, extents: Sequence[int], starts: Sequence[int], kept: Sequence[int]) -> Tensor:
        """Sampling grid (1, h, w, 2) of a cropped, randomly rotated, sheared and scaled plane, for `grid_sample`."""
        limits = self.augmentation
        matrix = (
            create_rotate(2, self.R.uniform(-limits.rotate, limits.rotate))
            @ create_shear(2, self.R.uniform(-limits.shear, limits.shear, 2))
            @ create_scale(2, self.R.uniform(1 - limits.scale, 1 + limits.scale, 2))
        )[:2, :2]
        slab, crop = np.array(extents[:2]), np.array(kept[:2])
        offset = np.array(starts[:2]) + (crop - slab) / 2  # of the crop's centre from the slab's, voxels
        theta = np.hstack([matrix * crop, 2 * (matrix @ offset)[:, None]]) / slab[:, None]  # edges at -1 and 1
        theta = theta[::-1, [1, 0, 2]].copy()  # grid_sample wants (W, H) instead of (H, W)
        return F.affine_grid(torch.from_numpy(theta).float()[None], [1, 1, *crop.tolist()], align_corners=False)


def _plain(data: Any) -> Any:
    """Without MONAI's metadata, which would be copied at every step."""
    return data.as_tensor() if isinstance(data, MetaTensor) else data


def _resample_in_plane(data: Tensor, grid: Tensor, mode: str) -> Tensor:
    """(C, H, W, D) -> (C, h, w, D) in the type of `data`; slices share the grid, so they pass as channels."""
    channels, height, width, depth = data.shape
    planes = data.permute(0, 3, 1, 2).reshape(1, channels * depth, height, width).float()
    planes = F.grid_sample(planes, grid, mode=mode, padding_mode="reflection", align_corners=False)
    return planes.view(channels, depth, *planes.shape[2:]).permute(0, 2, 3, 1).to(data.dtype)


def _reflect_pad(data: Tensor, size: Sequence[int]) -> Tensor:
    """Pads (C, H, W, D) at both ends to `size` by reflection, repeated where the padding is longer than the image."""
    for axis, (extent, target) in enumerate(zip(data.shape[1:], size, strict=True), start=1):
        if extent < target:
            before = (target - extent) // 2
            index = np.pad(np.arange(extent), (before, target - extent - before), mode="reflect")
            data = data.index_select(axis, torch.from_numpy(index))
    return data
