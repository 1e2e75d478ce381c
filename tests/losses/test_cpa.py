"""CPALoss against recorded numbers of the published loss, and what it promises on its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_petl.losses import CPALoss
from monai_petl.losses.prototypes import resample
from tests.parity_cases import check, coordinate_volume, load_cases, load_expected, tensors

CASES = load_cases("cpa", kind="cpa")
STILL = [[0, 0, 0, 0]]


def view(size: tuple[int, int, int], batch: int = 2, channels: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random embedding of half the in-plane size, and centred coordinates (B, 3, *size)."""
    generator = torch.Generator().manual_seed(seed)
    height, width, depth = size
    embedding = torch.randn(batch, channels, height // 2, width // 2, depth, generator=generator)
    identity = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    maps = [{"matrix": identity, "offset": [0.0, 0.0, 0.0]}] * batch
    return embedding, coordinate_volume({"size": size, "maps": maps})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_matches_the_published_loss(case):
    expected = load_expected("cpa")
    inputs = tensors(case, f"input.{case['name']}.")
    coords_students = [coordinate_volume(row) for row in case["coordinates"]["students"]]
    coords_teacher = coordinate_volume(case["coordinates"]["teacher"])
    teacher = inputs["embedding_teacher"]
    students = [inputs[f"embedding_student{index}"].requires_grad_() for index in range(len(coords_students))]

    loss = CPALoss(**case["config"], coordinate_crop="published")
    terms = loss(students, teacher, coords_students, coords_teacher, case["jitter"])
    terms["loss"].backward()
    check(expected, case, "loss_per_student", terms["per_student"])
    check(expected, case, "cross_entropy_per_student_and_sample", terms["per_student_and_sample"])

    targets = loss.teacher_targets(teacher, coords_teacher)
    for index, (student, coords) in enumerate(zip(students, coords_students, strict=True)):
        check(expected, case, f"grad.embedding_student{index}", student.grad)
        nearest, kept = loss.correspondence(coords, student.shape[2:], targets.point_positions, case["jitter"][index])
        check(expected, case, f"nearest_teacher.student{index}", nearest)
        check(expected, case, f"kept.student{index}", kept)
    height, width, depth = (max(extent // 2, 1) for extent in teacher.shape[2:])
    assignments = targets.assignments.mT.unflatten(-1, (height, width, depth))[..., depth // 2]
    check(expected, case, "assignments_middle_slice", assignments)


def test_equal_views_cost_the_entropy_of_the_assignments():
    embedding, coords = view((32, 24, 1))
    loss = CPALoss(temperature_student=0.033)
    terms = loss([embedding], embedding, [coords], coords, jitter=STILL)
    assignments = loss.teacher_targets(embedding, coords).assignments
    entropy = -(assignments * (assignments + 1e-16).log()).sum(dim=-1).mean()
    torch.testing.assert_close(terms["loss"], 0.01 * entropy)
    assert terms["loss"] >= 0
    assert terms["kept"].item() == 1


def test_only_students_receive_a_gradient():
    student, coords_student = view((24, 24, 2), seed=1)
    teacher, coords_teacher = view((32, 32, 2), seed=2)
    for data in (student, teacher, coords_student, coords_teacher):
        data.requires_grad_()
    CPALoss()([student], teacher, [coords_student], coords_teacher)["loss"].backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert coords_teacher.grad is None
    assert coords_student.grad is None


def test_student_outside_the_teachers_view_costs_exactly_nothing():
    student, coords = view((24, 24, 1), seed=1)
    teacher, coords_teacher = view((32, 32, 1), seed=2)
    student.requires_grad_()
    terms = CPALoss()([student], teacher, [coords + 100], coords_teacher)
    terms["loss"].backward()
    assert terms["loss"].item() == 0
    assert terms["kept"].item() == 0
    assert student.grad.abs().max() == 0


def test_sample_outside_the_teachers_view_leaves_the_mean():
    student, coords = view((24, 24, 1), seed=1)
    teacher, coords_teacher = view((32, 32, 1), seed=2)
    coords[1] += 100
    both = CPALoss()([student], teacher, [coords], coords_teacher, STILL)
    first = CPALoss()([student[:1]], teacher[:1], [coords[:1]], coords_teacher[:1], STILL)
    torch.testing.assert_close(both["loss"], first["loss"])


@pytest.mark.parametrize("size", [(32, 48, 1), (40, 36, 4), (20, 14, 10), (6, 6, 1)])
def test_prototypes_are_unit_vectors_one_per_seed(size):
    embedding, coords = view(size)
    targets = CPALoss().teacher_targets(embedding, coords)
    count = torch.tensor([max(extent // 8, 1) for extent in embedding.shape[2:]]).prod().item()
    assert targets.prototypes.shape == (2, 6, count)
    torch.testing.assert_close(targets.prototypes.norm(dim=1), torch.ones(2, count))
    torch.testing.assert_close(targets.assignments.sum(dim=-1), torch.ones(targets.assignments.shape[:2]))


def test_samples_do_not_mix():
    student, coords = view((24, 24, 1), batch=4, seed=1)
    teacher, coords_teacher = view((32, 32, 1), batch=4, seed=2)
    order = torch.tensor([2, 0, 3, 1])
    loss = CPALoss()
    terms = loss([student], teacher, [coords], coords_teacher, STILL)
    permuted = loss([student[order]], teacher[order], [coords[order]], coords_teacher[order], STILL)
    torch.testing.assert_close(
        permuted["per_student_and_sample"], terms["per_student_and_sample"][:, order], rtol=1e-5, atol=1e-6
    )


def test_terms_of_students_are_summed():
    small, coords_small = view((24, 24, 1), seed=1)
    large, coords_large = view((28, 32, 1), seed=3)
    teacher, coords_teacher = view((32, 32, 1), seed=2)
    terms = CPALoss()([small, large], teacher, [coords_small, coords_large], coords_teacher, STILL * 2)
    alone = CPALoss()([large], teacher, [coords_large], coords_teacher, STILL)
    torch.testing.assert_close(terms["per_student"][1], alone["loss"])
    torch.testing.assert_close(terms["per_student"].sum(), terms["loss"])


def test_gradient_is_that_of_the_written_out_cross_entropy():
    student, coords = view((24, 24, 1), seed=1)
    teacher, coords_teacher = view((32, 32, 1), seed=2)
    student.requires_grad_()
    loss = CPALoss(weight=1.0)
    value = loss([student], teacher, [coords], coords_teacher, STILL)["loss"]
    (gradient,) = torch.autograd.grad(value, student)

    targets = loss.teacher_targets(teacher, coords_teacher)
    nearest, _ = loss.correspondence(coords, student.shape[2:], targets.point_positions)
    points = torch.nn.functional.normalize(resample(student, (6, 6, 1)).flatten(2), dim=1)
    probabilities = (points.mT @ targets.prototypes / 0.066).softmax(dim=-1)
    rows = torch.stack([sample[index] for sample, index in zip(targets.assignments, nearest, strict=True)])
    expected = -(rows * (probabilities + 1e-16).log()).sum(dim=-1).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-4, atol=1e-7)


def test_little_is_kept_for_the_backward_pass():
    """One (points, prototypes) tensor a student, the targets, and vectors; never the distances."""
    student, coords = view((64, 64, 1), seed=1)
    teacher, coords_teacher = view((64, 64, 1), seed=2)
    student.requires_grad_()
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        kept[saved.data_ptr()] = saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        CPALoss()([student], teacher, [coords], coords_teacher, STILL)
    assignments = 2 * (16 * 16) * (4 * 4)  # batch, points, prototypes
    assert [count for count in kept.values() if count >= assignments] == [assignments] * 2


@pytest.mark.parametrize(("coordinate_crop", "aligned"), [("scaled", True), ("published", False)])
def test_jittered_coordinates_stay_with_their_embedding(coordinate_crop, aligned):
    _, coords = view((32, 24, 1))
    loss = CPALoss(coordinate_crop=coordinate_crop, max_distance=1e-3)
    # an embedding that holds its own coordinates shows where its points come from
    embedding = resample(coords, (16, 12, 1))
    positions = resample(embedding[:, :, 1:], (8, 6, 1)).flatten(2)
    nearest, kept = loss.correspondence(coords, (16, 12, 1), positions, crop=[1, 0, 0, 0])
    assert kept.all().item() is aligned
    if aligned:
        assert torch.equal(nearest, torch.arange(48).expand(2, -1))


def test_jitter_is_drawn_in_training_only():
    student, coords = view((24, 24, 1), seed=1)
    teacher, coords_teacher = view((32, 32, 1), seed=2)
    loss = CPALoss()
    draws = {loss([student], teacher, [coords], coords_teacher)["loss"].item() for _ in range(10)}
    assert len(draws) > 1
    loss.eval()
    draws = {loss([student], teacher, [coords], coords_teacher)["loss"].item() for _ in range(3)}
    still = loss([student], teacher, [coords], coords_teacher, STILL)["loss"].item()
    assert draws == {still}


def test_autocast_does_not_reduce_the_precision():
    student, coords = view((24, 24, 1), seed=1)
    teacher, coords_teacher = view((32, 32, 1), seed=2)
    loss = CPALoss()
    plain = loss([student], teacher, [coords], coords_teacher, STILL)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss([student], teacher, [coords], coords_teacher, STILL)["loss"]
    assert torch.equal(plain, mixed)


def test_options_change_the_loss():
    student, coords = view((48, 48, 4), seed=1)
    teacher, coords_teacher = view((64, 64, 4), seed=2)
    options = [
        {},
        {"fwhm": 16.0},
        {"weight_prototypes": False},
        {"weight_targets": True},
        {"normalise_prototypes": True},
        {"iterations": 0},
        {"z_scale": 8.0, "fwhm": 16.0},
    ]
    losses = {
        CPALoss(**option)([student], teacher, [coords], coords_teacher, STILL)["loss"].item() for option in options
    }
    assert len(losses) == len(options)


def test_wrong_shapes_are_explained():
    student, coords = view((24, 24, 1))
    teacher, coords_teacher = view((32, 32, 1))
    loss = CPALoss()
    with pytest.raises(ValueError, match="one coordinate volume a student view"):
        loss([student, student], teacher, [coords], coords_teacher)
    with pytest.raises(ValueError, match="must be sequences"):
        loss(student, teacher, coords, coords_teacher)
    with pytest.raises(ValueError, match="embedding of student 0 must be"):
        loss([student[:, :3]], teacher, [coords], coords_teacher)
    with pytest.raises(ValueError, match="coordinates of the teacher must be"):
        loss([student], teacher, [coords], coords_teacher[:, :2])
    with pytest.raises(ValueError, match="four numbers for each"):
        loss([student], teacher, [coords], coords_teacher, [[0, 0]])
    with pytest.raises(ValueError, match="cannot crop"):
        loss([student], teacher, [coords], coords_teacher, [[6, 6, 0, 0]])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature_student": 0.0}, "temperature_student must be positive"),
        ({"reduction": 0.5}, "must be at least 1"),
        ({"iterations": -1}, "must not be negative"),
        ({"coordinate_crop": "none"}, "coordinate_crop must be"),
    ],
)
def test_wrong_options_are_explained(option, message):
    with pytest.raises(ValueError, match=message):
        CPALoss(**option)
