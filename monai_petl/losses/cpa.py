"""Contrastive prototype assignment (CPA): a dense self-supervised loss between augmented views of one image.

A teacher's embedding is clustered into prototypes, softly and with a preference for nearby voxels. Every student
voxel has to be assigned to these prototypes as the teacher voxel at the same place in the body is.

Reference: Fischer et al., "Prompt Tuning for Parameter-efficient Medical Image Segmentation", 2022, arXiv 2211.09233.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from monai_petl.losses.prototypes import Prototypes, nearest_points, resample, soft_k_means

__all__ = ["CPALoss"]

FWHM_PER_SIGMA = 2.355  # of a Gaussian, rounded as published
NO_JITTER = (0, 0, 0, 0)
LOG_EPS = 1e-16

Jitter = Sequence[Sequence[int]]


class CPALoss(nn.Module):
    """Cross-entropy between the prototype assignments of a teacher view and those of one or more student views.

    Per sample, and never across samples: prototypes are seeded on a coarse grid of the teacher's embedding and moved
    by soft k-means; the teacher's assignments `softmax(cos / temperature_teacher)` are the targets of the student
    points' assignments `softmax(cos / temperature_student)`. A student point takes the target of the teacher
    point nearest to it in the original image, and is left out when that one is further away than `max_distance`,
    thus outside the teacher's view. Only the students' embeddings receive a gradient. Everything is computed in
    float32, also under autocast.

    Args:
        reduction: embeddings are resampled to `floor(size / reduction)` points an axis, at least 1.
        prototype_reduction: prototypes are seeded on `floor(size / prototype_reduction)` points an axis, at least 1.
        iterations: updates of the prototypes.
        fwhm: full width at half maximum, in voxels, of the spatial weight between a voxel and a prototype.
        temperature_teacher: temperature of the teacher's assignments, in the k-means too.
        temperature_student: temperature of the students' assignments.
        max_distance: largest distance, in voxels, between a student point and the teacher point that is its target.
        z_scale: factor on differences along the last axis in all distances; 2 makes voxels of 1.25 x 1.25 x 2.5 mm
            cubic.
        weight: factor on the loss.
        weight_prototypes: use the spatial weight in the updates of the prototypes.
        weight_targets: use the spatial weight in the targets too, renormalised to sum to one.
        normalise_prototypes: average embeddings of unit length in the updates. By default (published) voxels count
            by the length of their embedding.
        coordinate_crop: "scaled" crops, for a jitter of one embedding voxel, as many coordinate voxels as it spans,
            so that embedding and coordinates stay aligned; "published" crops the same number from both, which shifts
            them against each other by up to a voxel when the embedding has half the size of the coordinates.

    Raises:
        ValueError: an argument is out of its range.

    Example::

        loss = CPALoss()
        terms = loss([embedding], embedding_teacher, [coords], coords_teacher)
        terms["loss"].backward()
    """

    def __init__(
        self,
        *,
        reduction: float = 2.0,
        prototype_reduction: float = 8.0,
        iterations: int = 3,
        fwhm: float = 128.0,
        temperature_teacher: float = 0.033,
        temperature_student: float = 0.066,
        max_distance: float = 4.0,
        z_scale: float = 2.0,
        weight: float = 0.01,
        weight_prototypes: bool = True,
        weight_targets: bool = False,
        normalise_prototypes: bool = False,
        coordinate_crop: Literal["scaled", "published"] = "scaled",
    ) -> None:
        super().__init__()
        positive = {
            "fwhm": fwhm,
            "temperature_teacher": temperature_teacher,
            "temperature_student": temperature_student,
            "z_scale": z_scale,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if reduction < 1 or prototype_reduction < 1:
            raise ValueError(
                f"reduction and prototype_reduction must be at least 1, got {reduction} and {prototype_reduction}"
            )
        if iterations < 0 or max_distance < 0:
            raise ValueError(f"iterations and max_distance must not be negative, got {iterations} and {max_distance}")
        if coordinate_crop not in ("scaled", "published"):
            raise ValueError(f'coordinate_crop must be "scaled" or "published", got {coordinate_crop!r}')
        self.reduction = reduction
        self.prototype_reduction = prototype_reduction
        self.iterations = iterations
        self.sigma = fwhm / FWHM_PER_SIGMA
        self.temperature_teacher = temperature_teacher
        self.temperature_student = temperature_student
        self.max_distance = max_distance
        self.z_scale = z_scale
        self.weight = weight
        self.weight_prototypes = weight_prototypes
        self.weight_targets = weight_targets
        self.normalise_prototypes = normalise_prototypes
        self.coordinate_crop = coordinate_crop

    def forward(
        self,
        students: Sequence[Tensor],
        teacher: Tensor,
        coords_students: Sequence[Tensor],
        coords_teacher: Tensor,
        jitter: Jitter | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            students: an embedding (B, C, h, w, d) a student view; sizes may differ.
            teacher: the teacher's embedding (B, C, h, w, d).
            coords_students: coordinates (B, 3, H, W, D) a student view, in voxels of the original image.
            coords_teacher: coordinates (B, 3, H, W, D) of the teacher's view.
            jitter: for each student the embedding voxels to crop: low and high end of the first axis, low and high
                end of the second. By default each is drawn from {0, 1} in training and 0 in evaluation.

        Returns:
            `loss`: the sum over students;
            `per_student` (S,): its terms, means over the samples that keep a point, 0 where none does;
            `per_student_and_sample` (S, B): cross-entropies without `weight` and without gradient;
            `kept` (S,): share of student points that have a target.

        Raises:
            ValueError: the shapes don't belong together.
        """
        self._check(students, teacher, coords_students, coords_teacher)
        if jitter is None:
            jitter = self._draw_jitter(len(students))
        if len(jitter) != len(students) or any(len(crop) != 4 for crop in jitter):
            raise ValueError(f"jitter needs four numbers for each of the {len(students)} students, got {jitter}")

        with torch.autocast(teacher.device.type, enabled=False):
            targets = self.teacher_targets(teacher, coords_teacher)
            terms = [
                self._student_term(embedding, coords, crop, targets)
                for embedding, coords, crop in zip(students, coords_students, jitter, strict=True)
            ]
        losses, per_sample, kept = (torch.stack(values) for values in zip(*terms, strict=True))
        return {"loss": losses.sum(), "per_student": losses, "per_student_and_sample": per_sample, "kept": kept}

    @torch.no_grad()
    def teacher_targets(self, embedding: Tensor, coords: Tensor) -> Prototypes:
        """Prototypes of a teacher view and the assignment of its points to them; shapes as in `forward`."""
        embedding, coords = embedding.float(), self._scaled(coords)
        size = _reduced_size(embedding, self.reduction)
        seeds = _reduced_size(embedding, self.prototype_reduction)
        return soft_k_means(
            resample(embedding, size).flatten(2),
            resample(coords, size).flatten(2),
            resample(embedding, seeds).flatten(2),
            resample(coords, seeds).flatten(2),
            iterations=self.iterations,
            temperature=self.temperature_teacher,
            sigma=self.sigma,
            weight_prototypes=self.weight_prototypes,
            weight_targets=self.weight_targets,
            normalise=self.normalise_prototypes,
        )

    @torch.no_grad()
    def correspondence(
        self, coords: Tensor, size: Sequence[int], teacher_positions: Tensor, crop: Sequence[int] = NO_JITTER
    ) -> tuple[Tensor, Tensor]:
        """Which teacher point is the target of each student point, and which student points have one.

        Args:
            coords: coordinates (B, 3, H, W, D) of the student's view, in voxels.
            size: (h, w, d) of its embedding before the crop.
            teacher_positions: (B, 3, N) as in `Prototypes.point_positions`.
            crop: the jitter of this student, in embedding voxels.

        Returns:
            Indices (B, M) into the N teacher points, and a mask (B, M) of those that are near enough.
        """
        if self.coordinate_crop == "scaled":
            scale = [round(coords.shape[axis + 2] / size[axis]) for axis in (0, 0, 1, 1)]
            crop = [voxels * factor for voxels, factor in zip(crop, scale, strict=True)]
        reduced = [max(int(extent / self.reduction), 1) for extent in size]
        positions = resample(_crop(self._scaled(coords), crop), reduced).flatten(2)
        distances, nearest = nearest_points(positions, teacher_positions)
        return nearest, distances <= self.max_distance

    def _student_term(
        self, embedding: Tensor, coords: Tensor, crop: Sequence[int], teacher: Prototypes
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = _reduced_size(embedding, self.reduction)  # of the map before the crop, so that its grid jitters
        nearest, kept = self.correspondence(coords, embedding.shape[2:], teacher.point_positions, crop)
        points = F.normalize(resample(_crop(embedding.float(), crop), size).flatten(2), dim=1)  # (B, C, M)
        logits = points.mT @ (teacher.prototypes / self.temperature_student)  # (B, M, P)
        cross_entropy = _AssignmentCrossEntropy.apply(logits, teacher.assignments, nearest)  # (B, M)

        count = kept.sum(dim=1)
        per_sample = (cross_entropy * kept).sum(dim=1) / count.clamp(min=1)
        loss = self.weight * per_sample.sum() / (count > 0).sum().clamp(min=1)
        return loss, per_sample.detach(), kept.float().mean()

    def _draw_jitter(self, students: int) -> Jitter:
        if not self.training:
            return [NO_JITTER] * students
        return torch.randint(0, 2, (students, 4)).tolist()

    def _scaled(self, coords: Tensor) -> Tensor:
        """Coordinates in which the plain Euclidean distance is the loss's distance."""
        coords = coords.float()
        return coords * coords.new_tensor([1.0, 1.0, self.z_scale]).view(1, 3, 1, 1, 1)

    @staticmethod
    def _check(
        students: Sequence[Tensor], teacher: Tensor, coords_students: Sequence[Tensor], coords_teacher: Tensor
    ) -> None:
        if isinstance(students, Tensor) or isinstance(coords_students, Tensor):
            raise ValueError("students and coords_students must be sequences with one tensor a student view")
        if not students or len(students) != len(coords_students):
            raise ValueError(
                f"expected one coordinate volume a student view and at least one view, got {len(students)} embeddings "
                f"and {len(coords_students)} coordinate volumes"
            )
        batch, channels = teacher.shape[:2]
        views = [*zip(students, coords_students, strict=True), (teacher, coords_teacher)]
        names = [*(f"student {index}" for index in range(len(students))), "the teacher"]
        for name, (embedding, coords) in zip(names, views, strict=True):
            if embedding.ndim != 5 or embedding.shape[:2] != (batch, channels):
                raise ValueError(
                    f"the embedding of {name} must be (B, C, h, w, d) with B={batch} and C={channels} as the teacher's "
                    f"is, got {tuple(embedding.shape)}"
                )
            if coords.ndim != 5 or coords.shape[:2] != (batch, 3):
                raise ValueError(
                    f"the coordinates of {name} must be (B, 3, H, W, D) with B={batch}, got {tuple(coords.shape)}"
                )


def _reduced_size(volume: Tensor, reduction: float) -> list[int]:
    return [max(int(extent / reduction), 1) for extent in volume.shape[2:]]


def _crop(volume: Tensor, crop: Sequence[int]) -> Tensor:
    """Removes voxels at both ends of the two in-plane axes of (B, C, H, W, D)."""
    top, bottom, left, right = crop
    height, width = volume.shape[2:4]
    if min(crop) < 0 or top + bottom >= height or left + right >= width:
        raise ValueError(f"cannot crop {list(crop)} voxels from a plane of {height} x {width}")
    return volume[:, :, top : height - bottom, left : width - right]


class _AssignmentCrossEntropy(torch.autograd.Function):
    """`-sum_j targets[nearest, j] * log(softmax(logits)_j + 1e-16)`, with gradient for the logits only.

    Written out so that one (B, M, P) tensor is kept for the backward pass and not four: the targets are looked up anew.
    The published bounds of the logarithm, -1000 and 0, are never reached beside the 1e-16 and left out.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, nearest: Tensor) -> Tensor:
        probabilities = logits.softmax(dim=-1)  # (B, M, P)
        ctx.save_for_backward(probabilities, targets, nearest)
        return (probabilities + LOG_EPS).log_().mul_(_gather_rows(targets, nearest)).sum(dim=-1).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        probabilities, targets, nearest = ctx.saved_tensors
        shares = _gather_rows(targets, nearest) * probabilities
        shares /= probabilities + LOG_EPS
        return (probabilities * shares.sum(dim=-1, keepdim=True)).sub_(shares).mul_(grad.unsqueeze(-1)), None, None


def _gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """(B, M, P) from rows (B, N, P) and index (B, M)."""
    batch, count, _ = rows.shape
    offset = torch.arange(batch, device=index.device)[:, None] * count
    return rows.flatten(0, 1)[index + offset]
