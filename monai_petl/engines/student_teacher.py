"""Pre-training with a student and a teacher that is its moving average: CPA and segmentation, apart or together.

Reference: Fischer et al., "Prompt Tuning for Parameter-efficient Medical Image Segmentation", 2022, arXiv 2211.09233.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import count
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.engines.utils import PrepareBatch
from torch import Tensor, nn
from torch.optim import Optimizer

from monai_petl.losses import CPALoss, SampleWeightedFocalLoss

__all__ = ["PrepareViews", "StudentTeacherTrainer", "make_teacher"]

Mode = Literal["self", "segmentation", "both"]


class StudentTeacherTrainer(SupervisedTrainer):
    """Trains a network on several views of an image, and a teacher along with it.

    One iteration: the teacher's parameters move towards the student's,
    `teacher <- momentum * teacher + (1 - momentum) * student`; the student sees its views, the teacher its own without
    gradient; the loss is the sum over the student views of the segmentation loss and the CPA loss; backward and step as
    in `SupervisedTrainer`, whose events, mixed precision and gradient accumulation apply. Buffers of the teacher
    (batch-norm statistics) come from its own forward passes.

    The network is called as `network(image, classes)`, where `classes` names the class that each sample is prompted
    with (or is None), and returns a tuple with `.logits` (B, 2, H, W, D) and `.embedding` (B, C, h, w, d). Batches
    are as `StudentTeacherViewsd` makes them.

    `engine.state.output` holds, beside MONAI's image, label, pred and loss, the terms `segmentation_loss` and
    `cpa_loss` with `segmentation_loss_student<i>` and `cpa_loss_student<i>`, and `cpa_kept`, the share of student
    points with a target: all scalars without gradient, for handlers to log. Add `GradientClipping` to
    `train_handlers` for clipping.

    Wrap a network of several prompted classes as `DistributedDataParallel(network, find_unused_parameters=True)`: the
    prompts of classes that a batch has not got receive no gradient.

    Args:
        device, max_epochs, train_data_loader, network, optimizer: see `SupervisedTrainer`.
        mode: "self" trains with CPA only, "segmentation" with the segmentation loss only and without running the
            teacher, "both" with their sum.
        teacher: by default `make_teacher(network)`. Pass one in to name it in a `CheckpointSaver` or
            `CheckpointLoader`.
        momentum: share of the teacher that each iteration keeps.
        cpa_loss: by default `CPALoss()`.
        segmentation_loss: called with logits (B, 2, H, W, D) and label (B, 1, H, W, D); by default
            `SampleWeightedFocalLoss()`. With `annotated` (B,) in the batch, it gets the annotated samples only. With
            `additive_class_weights`, it is also given that loss's keyword `weight` (B, 2).
        additive_class_weights: class name -> what is added to the weight 1 of the foreground, for samples of that
            class. Every class of the batches has to be listed. By default all weights are 1.
        prepare_batch: by default `PrepareViews()`.
        options: further arguments of `SupervisedTrainer`, such as `train_handlers`, `epoch_length` and `amp`.

    Raises:
        ValueError: `mode` is unknown, `momentum` not in [0, 1], or the loss has no weights to add to.
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        network: nn.Module,
        optimizer: Optimizer,
        mode: Mode = "both",
        teacher: nn.Module | None = None,
        momentum: float = 0.99,
        cpa_loss: CPALoss | None = None,
        segmentation_loss: Callable[..., Tensor] | None = None,
        additive_class_weights: Mapping[str, float] | None = None,
        prepare_batch: Callable[..., tuple[Views, Targets]] | None = None,
        **options: Any,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f'mode must be "self", "segmentation" or "both", got {mode!r}')
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        if additive_class_weights is not None and segmentation_loss is not None:
            call = segmentation_loss.forward if isinstance(segmentation_loss, nn.Module) else segmentation_loss
            if "weight" not in inspect.signature(call).parameters:
                raise ValueError(
                    f"additive_class_weights needs a loss with the argument `weight`, such as SampleWeightedFocalLoss; "
                    f"{type(segmentation_loss).__name__} has none"
                )
        self.mode = mode
        self.teacher = make_teacher(network) if teacher is None else teacher
        self.momentum = momentum
        self.cpa_loss = CPALoss() if cpa_loss is None else cpa_loss
        self.segmentation_loss = SampleWeightedFocalLoss() if segmentation_loss is None else segmentation_loss
        self.additive_class_weights = additive_class_weights
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=self._total_loss,
            inferer=self._run_networks,
            prepare_batch=PrepareViews() if prepare_batch is None else prepare_batch,
            decollate=False,  # an output is one tuple of views of different sizes; there is no list of samples in it
            **options,
        )

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Moves the teacher's parameters towards the student's; buffers stay."""
        student: list[Tensor] = list(_unwrapped(self.network).parameters())
        teacher: list[Tensor] = list(self.teacher.parameters())
        if len(student) != len(teacher):
            raise ValueError(
                f"the student has {len(student)} parameter tensors and the teacher {len(teacher)}; make the teacher "
                "after the last change to the network, for example after adding classes"
            )
        torch._foreach_lerp_(teacher, student, 1 - self.momentum)

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> dict[str, Any]:
        self.update_teacher()
        return super()._iteration(engine, batchdata)

    def _run_networks(self, views: Views, network: nn.Module) -> Predictions:
        """In place of an inferer: the student on its views, then the teacher on its own."""
        students = [network(image, views.classes) for image in views.students]
        if not all(hasattr(student, "logits") and hasattr(student, "embedding") for student in students):
            raise TypeError(
                "network(image, classes) must return a tuple with .logits and .embedding, got "
                f"{type(students[0]).__name__} for classes={views.classes}. A PUNet does so when the batch names a "
                "class for each sample."
            )
        if self.mode == "segmentation":
            return Predictions(students, None)
        if views.teacher is None:
            raise ValueError(f'mode "{self.mode}" needs teacher_image and teacher_coords in the batch')
        self.teacher.train()  # so that its batch statistics follow its own views
        with torch.no_grad():
            return Predictions(students, self.teacher(views.teacher, views.classes))

    def _total_loss(self, predictions: Predictions, targets: Targets) -> Tensor:
        """In place of a loss function: the sum of all terms, which are noted in the engine's output."""
        output = self.state.output
        losses = []
        if self.mode != "self":
            terms = torch.stack(self._segmentation_terms(predictions, targets))
            losses.append(terms.sum())
            output.update(_named("segmentation_loss", terms))
        if predictions.teacher is not None:
            cpa = self.cpa_loss(
                [student.embedding for student in predictions.students],
                predictions.teacher.embedding,
                targets.coords_students,
                targets.coords_teacher,
            )
            losses.append(cpa["loss"])
            output.update(_named("cpa_loss", cpa["per_student"]))
            output["cpa_kept"] = cpa["kept"].mean()
        return torch.stack(losses).sum()

    def _segmentation_terms(self, predictions: Predictions, targets: Targets) -> list[Tensor]:
        if not targets.labels:
            raise ValueError(f'mode "{self.mode}" needs student0_label, student1_label, ... in the batch')
        weight = None if self.additive_class_weights is None else self._class_weights(targets.classes)
        annotated = None if targets.annotated is None else targets.annotated.bool()
        terms = []
        for student, label in zip(predictions.students, targets.labels, strict=True):
            logits, rows = student.logits, weight
            if annotated is not None:
                logits, label = logits[annotated], label[annotated]
                rows = None if weight is None else weight[annotated]
            if not len(logits):
                terms.append(logits.sum())  # 0, with a gradient of 0
            elif rows is None:
                terms.append(self.segmentation_loss(logits, label))
            else:
                terms.append(self.segmentation_loss(logits, label, weight=rows))
        return terms

    def _class_weights(self, classes: Sequence[str] | None) -> Tensor:
        """(B, 2): weights of background and foreground for each sample."""
        known = self.additive_class_weights or {}
        if classes is None or not set(classes) <= set(known):
            raise ValueError(f"the batch has the classes {classes}, but additive_class_weights are for {sorted(known)}")
        return torch.tensor([[1.0, 1.0 + known[name]] for name in classes]).to(self.state.device, non_blocking=True)


def make_teacher(network: nn.Module) -> nn.Module:
    """A copy of the network, without gradients and in training mode; of the bare network when it is wrapped."""
    return deepcopy(_unwrapped(network)).requires_grad_(False).train()


class PrepareViews(PrepareBatch):
    """Moves a batch of `StudentTeacherViewsd` to the device and sorts it into network inputs and loss targets.

    Args:
        class_key: the class names, one a sample; without that key the network runs without prompts.
        annotated_key: whether each sample has a label; without that key all have.
    """

    def __init__(self, class_key: str = "class_name", annotated_key: str = "annotated") -> None:
        self.class_key = class_key
        self.annotated_key = annotated_key

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Views, Targets]:
        """
        Raises:
            KeyError: there is no `student0_image`.
        """

        def moved(key: str) -> Tensor | None:
            data = batchdata.get(key)
            data = data.as_tensor() if isinstance(data, MetaTensor) else data
            return (
                None if data is None else torch.as_tensor(data).to(device=device, non_blocking=non_blocking, **kwargs)
            )

        def moved_students(name: str) -> list[Tensor]:
            tensors = (moved(f"student{index}_{name}") for index in count())
            return list(iter(lambda: next(tensors), None))  # up to the first index that the batch has not got

        students = moved_students("image")
        if not students:
            raise KeyError(f"the batch has no student0_image; it has {sorted(batchdata)}")
        classes = batchdata.get(self.class_key)
        classes = None if classes is None else list(classes)
        targets = Targets(
            labels=moved_students("label"),
            coords_students=moved_students("coords"),
            coords_teacher=moved("teacher_coords"),
            classes=classes,
            annotated=moved(self.annotated_key),
        )
        return Views(students, moved("teacher_image"), classes), targets


class Views(NamedTuple):
    """Inputs of the networks."""

    students: list[Tensor]
    """(B, channels, H, W, D) a view"""
    teacher: Tensor | None
    classes: list[str] | None
    """names of the classes that the samples are prompted with"""


class Targets(NamedTuple):
    """What the losses compare the outputs with."""

    labels: list[Tensor]
    """(B, 1, H, W, D) a student view; empty when there are none"""
    coords_students: list[Tensor]
    """(B, 3, H, W, D) voxels, a student view"""
    coords_teacher: Tensor | None
    classes: list[str] | None
    annotated: Tensor | None
    """(B,) bool"""


class Output(Protocol):
    """What a network returns."""

    @property
    def logits(self) -> Tensor: ...

    @property
    def embedding(self) -> Tensor: ...


class Predictions(NamedTuple):
    """Outputs of the networks."""

    students: list[Output]
    teacher: Output | None


def _named(name: str, terms: Tensor) -> dict[str, Tensor]:
    """The sum and the terms (S,) of the students, by name, without gradient."""
    terms = terms.detach()
    return {name: terms.sum(), **{f"{name}_student{index}": term for index, term in enumerate(terms)}}


def _unwrapped(network: nn.Module) -> nn.Module:
    """The bare network inside `DataParallel`, `DistributedDataParallel` and `torch.compile`."""
    for attribute in ("module", "_orig_mod"):
        inner = getattr(network, attribute, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return network
