"""What does a step of pre-training cost, and how much of it is contrastive prototype assignment (CPA)?

Floor of CPA: its matrix products at the machine's own rate. Floor of the step: the products of both students' forward
pass (once more for the gradients of activations and of weights, attention products three times in all) and of the
teacher's, and those of CPA.

    python benchmarks/pretraining.py
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import fire
import torch
from common import Products, interleaved, markdown, ratio, report, ways_of_products
from torch import Tensor

from monai_petl.engines import StudentTeacherTrainer, make_teacher
from monai_petl.losses import CPALoss
from monai_petl.networks import PUNet

STUDENTS, TEACHER = (224, 160), 256


def main(batch_size: int = 2, repeats: int = 5, threads: int = 1) -> None:
    """One step of the student-teacher trainer: two student views, a teacher view, both losses, backward, AdamW.

    Args:
        batch_size: slabs a step.
        repeats: how often everything is repeated.
        threads: 1 measures processor time, more measure time on the clock.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    network = PUNet(classes=("a",))
    teacher, batch = make_teacher(network), _batch(batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def step(mode: str) -> None:
        StudentTeacherTrainer(torch.device("cpu"), 1, [batch], network, optimizer, mode=mode, teacher=teacher).run()

    loss = CPALoss()
    embeddings = [torch.randn(batch_size, 32, n // 2, n // 2, 1, requires_grad=True) for n in STUDENTS]
    target = torch.randn(batch_size, 32, TEACHER // 2, TEACHER // 2, 1)
    coords = [batch[f"student{i}_coords"] for i in range(len(STUDENTS))]

    def cpa() -> None:
        loss(embeddings, target, coords, batch["teacher_coords"])["loss"].backward()

    runs: dict[str, Callable[[], object]] = {
        "both": lambda: step("both"),
        "segmentation": lambda: step("segmentation"),
        "cpa": cpa,
    }
    seconds = interleaved(runs, repeats)
    cpa_floor = sum(count * best for count, best in _cpa_products(batch_size, repeats))
    floor = cpa_floor
    for size, weight in ((STUDENTS[0], 3), (STUDENTS[1], 3), (TEACHER, 1)):
        image = torch.randn(batch_size, 1, size, size, 1)
        products = Products.of(network, lambda image=image: network(image, ["a"] * batch_size))
        floor += weight * sum(products.seconds(repeats).values())
    share = ratio(seconds["cpa"], seconds["both"])
    rows = [
        ("whole step, both losses", f"{min(seconds['both']):.2f}", "100 %", f"{min(seconds['both']) / floor:.2f}"),
        (
            "step with segmentation only (no teacher, no CPA)",
            f"{min(seconds['segmentation']):.2f}",
            f"{100 * ratio(seconds['segmentation'], seconds['both']):.0f} %",
            "",
        ),
        (
            "CPA loss, forward and backward",
            f"{min(seconds['cpa']):.2f}",
            f"{100 * share:.0f} %",
            f"{min(seconds['cpa']) / cpa_floor:.2f}",
        ),
    ]
    report(
        "pretraining",
        [markdown(("pre-training", f"s a step of {batch_size} slabs", "share", "x floor"), rows)],
        f"CPA takes {median(seconds['cpa']):.2f} s, {100 * share:.0f} % of a pre-training step.",
        {
            "batch_size": batch_size,
            "repeats": repeats,
            "seconds": seconds,
            "floor_seconds": {"both": floor, "cpa": cpa_floor},
            "cpa_share": share,
        },
    )


def _batch(batch_size: int) -> dict[str, Tensor | list[str]]:
    batch: dict[str, Tensor | list[str]] = {"class_name": ["a"] * batch_size}
    for name, size in (*((f"student{i}", n) for i, n in enumerate(STUDENTS)), ("teacher", TEACHER)):
        axis = torch.arange(size, dtype=torch.float32) - (size - 1) / 2  # crops around one centre
        grid = torch.stack(torch.meshgrid(axis, axis, torch.zeros(1), indexing="ij"))
        batch[f"{name}_image"] = torch.randn(batch_size, 1, size, size, 1)
        batch[f"{name}_coords"] = grid.expand(batch_size, -1, -1, -1, -1).contiguous()
        batch[f"{name}_label"] = torch.randint(0, 2, (batch_size, 1, size, size, 1))
    return batch


def _cpa_products(batch: int, repeats: int) -> list[tuple[int, float]]:
    """Number and seconds of the matrix products of CPA with its default settings."""
    channels, prototypes, points = 32, (TEACHER // 16) ** 2, (TEACHER // 4) ** 2
    sizes = {
        (batch, points, channels, prototypes): 4,  # similarity: three updates of the prototypes, then the targets
        (batch, channels + 3, points, prototypes): 3,  # means of embeddings and coordinates
    }
    for size in STUDENTS:
        sizes[batch, (size // 4) ** 2, channels, prototypes] = 1  # similarity
        sizes[batch, (size // 4) ** 2, prototypes, channels] = 1  # its gradient
    return [
        (count, min(map(min, interleaved(ways_of_products(*size), repeats).values()))) for size, count in sizes.items()
    ]


if __name__ == "__main__":
    fire.Fire(main)
