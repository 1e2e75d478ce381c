"""One whole pre-training step of the trainer with PUNet against recorded numbers of the published implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_petl.engines import StudentTeacherTrainer
from monai_petl.losses import CPALoss
from monai_petl.networks import PUNet
from tests.networks.punet.punet_parity import gradient_of, network_of, published_value
from tests.parity_cases import Case, check, coordinate_volume, load_cases, load_expected, tensors

(CASE,) = load_cases("cpa", kind="step")
EXPECTED = load_expected("cpa")


class JitteredCPALoss(CPALoss):
    """The loss with the recorded jitter in place of a random one."""

    def forward(self, *inputs: Tensor, jitter: object = None) -> dict[str, Tensor]:
        return super().forward(*inputs, jitter=CASE["jitter"])


def batch_of(case: Case) -> dict[str, object]:
    given = tensors(case, f"input.{case['name']}.")
    batch: dict[str, object] = {
        "class_name": case["batch_classes"],
        "teacher_image": given["image_teacher"],
        "teacher_coords": coordinate_volume(case["coordinates"]["teacher"]),
    }
    for i, view in enumerate(case["coordinates"]["students"]):
        batch[f"student{i}_image"] = given[f"image_student{i}"]
        batch[f"student{i}_label"] = (given[f"label_score_student{i}"] > 0.4).float()[:, None]
        batch[f"student{i}_coords"] = coordinate_volume(view)
    return batch


def test_one_pretraining_step_equals_the_published_one() -> None:
    config = CASE["config"]
    student, teacher = (
        network_of(CASE, config["network"], CASE["weight_prefix"][who]) for who in ("student", "teacher")
    )
    seen: dict[str, list] = {"student": [], "teacher": []}
    for name, network in (("student", student), ("teacher", teacher)):
        network.register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(out))
    extra = config["focal"]["additive_alpha_per_sample"]
    trainer = StudentTeacherTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[batch_of(CASE)],
        network=student,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.0),
        teacher=teacher.requires_grad_(False),
        momentum=config["tau"],
        cpa_loss=JitteredCPALoss(**config["cpa"], coordinate_crop="published"),
        additive_class_weights={name: extra[b][1] for b, name in enumerate(CASE["batch_classes"])},
    )
    trainer.run()

    compared = set()

    def compare(name: str, value: Tensor) -> None:
        check(EXPECTED, CASE, name, value)
        compared.add(name)

    output = trainer.state.output
    for part, name in (("segmentation", "segmentation_loss"), ("cpa", "cpa_loss")):
        compare(f"{part}_per_student", torch.stack([output[f"{name}_student{i}"] for i in (0, 1)]))
    compare("total", output["loss"])
    for i, out in enumerate(seen["student"]):
        compare(f"logits_student{i}", out.logits)
    compare("embedding_teacher", seen["teacher"][0].embedding)
    for name in CASE["gradient"]["with_respect_to"]:
        compare(f"grad.{name}", gradient_of(student, name))
    networks: dict[str, PUNet] = {"student_after": student, "teacher_after": teacher}
    for name in CASE["outputs"]:
        who, _, rest = name.partition(".")
        if who in networks:
            compare(name, published_value(networks[who], rest))
    assert compared == set(CASE["outputs"])
