"""Views of a slab: shapes, the agreement of image, label and coordinates, determinism, and what may not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import Tensor

from monai_petl.losses.prototypes import nearest_points
from monai_petl.transforms import (
    AddCoordinatesd,
    RandViewd,
    StudentTeacherViewsd,
    ViewAugmentation,
)

UNCHANGED = ViewAugmentation(mask_prob=0.0, intensity_prob=0.0, affine_prob=0.0)
GEOMETRY = ViewAugmentation(mask_prob=0.0, intensity_prob=0.0, affine_prob=1.0)
INTENSITY = ViewAugmentation(mask_prob=0.3, intensity_prob=1.0, affine_prob=0.0)


def slab(size=(64, 56, 1), seed=0):
    """A slab with a random image, a label of blocks 0 to 3, and coordinates."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.arange(size[0]).div(16, rounding_mode="floor")[:, None, None] % 4
    sample = {
        "image": MetaTensor(2 * torch.rand(1, *size, generator=generator) - 1),
        "label": MetaTensor(blocks.expand(size)[None].to(torch.uint8).clone()),
        "class_name": "liver",
    }
    return AddCoordinatesd()(sample)


def interior(coords: Tensor, size, margin: float) -> Tensor:
    """Voxels of a view that come from at least `margin` voxels inside the slab in the plane."""
    limits = torch.tensor(size[:2]).view(2, 1, 1, 1) / 2 - margin
    return (coords[:2].abs() < limits).all(dim=0)


@pytest.mark.parametrize(
    ("size", "students", "teacher"),
    [
        ((64, 56, 1), [(48, 48, 1), (32, 40, 1)], (64, 56, 1)),
        ((48, 48, 4), [(32, 32, 4)], (48, 48, 4)),
        ((40, 40, 6), [(32, 32, 4), (24, 24, 4), (16, 16, 2)], (40, 40, 4)),
        ((20, 24, 1), [(48, 48, 1), (16, 64, 1)], (64, 64, 1)),
        ((5, 1, 2), [(16, 8, 8)], (32, 32, 8)),
    ],
    ids=["2d", "3d", "3d with three students", "smaller than the views", "much smaller than the views"],
)
@pytest.mark.parametrize("augmentation", [UNCHANGED, GEOMETRY, None], ids=["unchanged", "affine", "default"])
def test_views_have_the_asked_sizes(size, students, teacher, augmentation):
    transform = StudentTeacherViewsd(students, teacher, augmentation, augmentation).set_random_state(1)
    views = transform(slab(size))
    for index, extents in enumerate(students):
        assert views[f"student{index}_image"].shape == (1, *extents)
        assert views[f"student{index}_label"].shape == (1, *extents)
        assert views[f"student{index}_coords"].shape == (3, *extents)
        assert views[f"student{index}_label"].dtype == torch.uint8
    assert views["teacher_image"].shape == (1, *teacher)
    assert views["teacher_coords"].shape == (3, *teacher)
    names = ["image", "label", "coords"]
    expected = {f"student{index}_{name}" for index in range(len(students)) for name in names}
    assert set(views) == expected | {"teacher_image", "teacher_coords", "class_name"}
    assert all(type(view) is Tensor for key, view in views.items() if key != "class_name")
    assert all(view.isfinite().all() for key, view in views.items() if key != "class_name")


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5)),
    view=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 7)),
    seed=st.integers(0, 1000),
)
def test_any_view_of_any_slab_has_its_size(size, view, seed):
    sample = RandViewd(view, GEOMETRY).set_random_state(seed)(slab(size))
    assert sample["image"].shape == sample["label"].shape == (1, *view)


def test_unchanged_view_is_a_crop():
    sample = slab()
    views = StudentTeacherViewsd([(32, 24, 1)], (64, 56, 1), UNCHANGED, UNCHANGED).set_random_state(2)(sample)
    assert torch.equal(views["teacher_image"], sample["image"].as_tensor())
    first = (views["student0_coords"][:2, 0, 0, 0] + torch.tensor([31.5, 27.5])).int().tolist()
    box = (slice(None), slice(first[0], first[0] + 32), slice(first[1], first[1] + 24))
    assert torch.equal(views["student0_image"], sample["image"].as_tensor()[box])
    assert torch.equal(views["student0_label"], sample["label"].as_tensor()[box])


def test_unchanged_views_overlap_to_within_a_sampling_step():
    """Reduced grids of step 4 that are shifted against each other: at most half the diagonal, 2.83 voxels, apart."""
    views = StudentTeacherViewsd([(48, 48, 1)], (64, 56, 1), UNCHANGED, UNCHANGED).set_random_state(5)(slab())
    points = [
        torch.nn.functional.avg_pool3d(views[f"{name}_coords"][None], (4, 4, 1)).flatten(2)
        for name in ("student0", "teacher")
    ]
    distances, _ = nearest_points(*points)
    assert distances.max() <= 2.83


@pytest.mark.parametrize("size", [(96, 80, 1), (64, 64, 3)])
def test_affine_moves_coordinates_with_the_image(size):
    """The image is a function of the coordinates before the affine, and still is after it."""
    sample = slab(size)
    wave = torch.sin(sample["coords"][0] / 9) + torch.cos(sample["coords"][1] / 7) + 0.1 * sample["coords"][2]
    sample["image"] = wave[None]
    view_size = (size[0] - 16, size[1] - 16, size[2])
    for seed in range(5):
        views = StudentTeacherViewsd([view_size], size, GEOMETRY, GEOMETRY).set_random_state(seed)(sample)
        for name in ("student0", "teacher"):
            coords = views[f"{name}_coords"]
            wave = torch.sin(coords[0] / 9) + torch.cos(coords[1] / 7) + 0.1 * coords[2]
            inside = interior(coords, size, margin=2)
            assert inside.float().mean() > 0.5
            assert (views[f"{name}_image"][0] - wave)[inside].abs().max() < 0.01


def test_point_keeps_its_coordinate_within_half_a_voxel():
    """A small bright spot is found, in every view that shows it, at the coordinate that it had in the slab."""
    size, spot = (96, 96, 1), torch.tensor([7.5, -11.5])
    sample = slab(size)
    distance = (sample["coords"][:2] - spot.view(2, 1, 1, 1)).square().sum(dim=0)
    sample["image"] = torch.exp(-distance / 8)[None]
    seen = 0
    for seed in range(20):
        views = StudentTeacherViewsd([(80, 80, 1)], size, GEOMETRY, GEOMETRY).set_random_state(seed)(sample)
        image = views["student0_image"][0]
        if image.max() > 0.9:
            found = (views["student0_coords"][:2] * image**4).sum(dim=(1, 2, 3)) / (image**4).sum()
            assert (found - spot).abs().max() < 0.5
            seen += 1
    assert seen >= 10


def test_label_follows_the_affine():
    sample = slab()
    views = StudentTeacherViewsd([(48, 48, 1)], (64, 56, 1), GEOMETRY).set_random_state(0)(sample)
    coords, label = views["student0_coords"], views["student0_label"][0]
    block = ((coords[0] + 31.5) / 16).floor()
    away_from_edges = ((coords[0] + 31.5 + 8) % 16 - 8).abs() > 1.5
    certain = away_from_edges & interior(coords, (64, 56), margin=2)
    assert torch.equal(label[certain].float(), block[certain] % 4)


def test_affine_draws_span_their_ranges():
    """The Jacobian of slab position by view position shows scale and rotation of every draw."""
    transform = StudentTeacherViewsd([(32, 32, 1)], (64, 64, 1), GEOMETRY, GEOMETRY).set_random_state(0)
    scales, angles = [], []
    for _ in range(200):
        coords = transform(slab((64, 64, 1)))["student0_coords"][:2, 8:24, 8:24, 0]
        along = coords[:, 1:, :].sub(coords[:, :-1, :]).median(dim=2).values.median(dim=1).values
        scales.append(along.norm().item())
        angles.append(torch.atan2(along[1], along[0]).item())
    assert 0.73 < min(scales) < 0.8
    assert 1.2 < max(scales) < 1.28
    assert -0.44 < min(angles) < -0.35
    assert 0.35 < max(angles) < 0.44


def test_intensity_changes_leave_slab_label_and_coordinates_alone():
    sample = slab()
    before = {key: value.clone() for key, value in sample.items() if key != "class_name"}
    transform = StudentTeacherViewsd([(64, 56, 1), (64, 56, 1)], (64, 56, 1), INTENSITY).set_random_state(0)
    for _ in range(10):
        views = transform(sample)
        assert not torch.equal(views["student0_image"], views["student1_image"])
        assert torch.equal(views["student0_label"], before["label"].as_tensor())
        assert torch.equal(views["student0_coords"], before["coords"])
        for key, value in before.items():
            assert torch.equal(sample[key], value)


def test_masks_are_drawn_for_students_and_not_for_the_teacher():
    size = (160, 160, 1)
    sample = slab(size)
    only_masks = ViewAugmentation(mask_prob=1 / 3, intensity_prob=0.0, affine_prob=0.0)
    teacher = ViewAugmentation(mask_prob=0.0, intensity_prob=0.0, affine_prob=0.0)
    transform = StudentTeacherViewsd([size], size, only_masks, teacher).set_random_state(0)
    changed = []
    for _ in range(20):
        views = transform(sample)
        changed.append((views["student0_image"] != sample["image"].as_tensor()).float().mean().item())
        assert torch.equal(views["teacher_image"], sample["image"].as_tensor())
    assert min(changed) > 0


def test_same_seed_gives_the_same_views():
    transform = StudentTeacherViewsd([(48, 48, 1), (32, 32, 1)], (64, 56, 1))
    first, second, other = (transform.set_random_state(seed)(slab()) for seed in (4, 4, 5))
    assert all(torch.equal(first[key], second[key]) for key in first if key != "class_name")
    assert not torch.equal(first["student0_image"], other["student0_image"])


def test_slabs_without_label_work():
    sample = slab()
    del sample["label"]
    views = StudentTeacherViewsd([(48, 48, 1)], (64, 56, 1)).set_random_state(0)(sample)
    assert "student0_label" not in views
    assert views["student0_image"].shape == (1, 48, 48, 1)


def test_view_for_training_keeps_image_and_label_together():
    sample = slab()
    sample["image"] = sample["label"].float()
    view = RandViewd((48, 48, 1), GEOMETRY).set_random_state(0)(sample)
    agreement = (view["image"].round() == view["label"]).float().mean()
    assert agreement > 0.95
    assert view["class_name"] == "liver"


def test_wrong_sizes_and_probabilities_are_explained():
    with pytest.raises(ValueError, match="three positive numbers"):
        StudentTeacherViewsd([(32, 32)], (64, 64, 1))
    with pytest.raises(ValueError, match="at least one size"):
        StudentTeacherViewsd([], (64, 64, 1))
    with pytest.raises(ValueError, match="mask_prob"):
        ViewAugmentation(mask_prob=0.5)
    with pytest.raises(ValueError, match="affine_prob"):
        ViewAugmentation(affine_prob=1.5)
    with pytest.raises(ValueError, match="scale"):
        ViewAugmentation(scale=1.0)


def test_padding_reflects():
    sample = {"image": torch.arange(4.0).view(1, 4, 1, 1), "coords": torch.zeros(3, 4, 1, 1)}
    views = StudentTeacherViewsd([(8, 1, 1)], (4, 2, 1), UNCHANGED, UNCHANGED)(sample)
    expected = np.pad(np.arange(4.0), (2, 2), mode="reflect")
    assert views["student0_image"].flatten().tolist() == expected.tolist()
    assert views["teacher_image"][0, :, :, 0].tolist() == [[value, value] for value in range(4)]
