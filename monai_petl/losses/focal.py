"""Focal loss with class weights that may differ from sample to sample, for batches that mix segmentation targets.

`monai.losses.FocalLoss` has one set of class weights a batch; when every sample is segmented for a class of its own
(prompted by its name), the weight of "foreground" belongs to the sample.

References: Lin et al., "Focal Loss for Dense Object Detection", 2017, arXiv 1708.02002; with per-sample weights as
in Fischer et al., "Prompt Tuning for Parameter-efficient Medical Image Segmentation", 2022, arXiv 2211.09233.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor, nn

__all__ = ["SampleWeightedFocalLoss"]


class SampleWeightedFocalLoss(nn.Module):
    """Mean over voxels of `alpha_y * (1 - p_y)**gamma * (-log p_y)`, where p is the softmax and y the voxel's label.

    For two channels this is twice `monai.losses.FocalLoss(to_onehot_y=True, use_softmax=True)`, which averages over the
    channels as well; with `gamma=0` and no weights it is the cross-entropy. It is not divided by the weights.

    Args:
        gamma: exponent of the focusing factor; 0 turns it off.
        weight: class weights alpha, one a channel, for calls that give none. By default 1 everywhere.
        log_floor: lower bound of `log p_y`.

    Raises:
        ValueError: `gamma` is neither 0 nor at least 1, a weight is negative, or `log_floor` is positive.

    Example::

        loss = SampleWeightedFocalLoss()
        logits, label = torch.randn(2, 2, 8, 8, 1), torch.randint(0, 2, (2, 1, 8, 8, 1))
        loss(logits, label)                                                   # all weights 1
        loss(logits, label, weight=torch.tensor([[1.0, 1.86], [1.0, 1.01]]))  # a row a sample
    """

    weight: Tensor | None

    def __init__(self, gamma: float = 4.0, weight: Sequence[float] | None = None, log_floor: float = -1000.0) -> None:
        super().__init__()
        if gamma < 0 or 0 < gamma < 1:  # between 0 and 1 the gradient is not finite where the prediction is right
            raise ValueError(f"gamma must be 0 or at least 1, got {gamma}")
        if log_floor > 0:
            raise ValueError(f"log_floor bounds a logarithm of a probability and must not be positive, got {log_floor}")
        if weight is not None and min(weight) < 0:
            raise ValueError(f"class weights must not be negative, got {list(weight)}")
        self.gamma = gamma
        self.log_floor = log_floor
        self.register_buffer("weight", None if weight is None else torch.tensor(weight), persistent=False)

    def forward(
        self, logits: Tensor, label: Tensor, weight: Tensor | None = None, annotated: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            logits: (B, I, *spatial), before the softmax.
            label: (B, 1, *spatial) or (B, *spatial), class indices 0 to I - 1 of any number type.
            weight: class weights (B, I), or (I,) for all samples.
            annotated: (B,), true for samples that have a label. The others are left out, with their weights; what their
                label holds does not matter. Without any annotated sample the loss is 0.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: the shapes don't belong together.
        """
        # .as_tensor() of MetaTensor: every operation on a MetaTensor costs a dispatch that the loss has no use for
        logits, label = (data.as_tensor() if isinstance(data, MetaTensor) else data for data in (logits, label))
        batch, channels = logits.shape[:2]
        if label.shape == (batch, 1, *logits.shape[2:]):
            label = label.squeeze(1)
        if label.shape != (batch, *logits.shape[2:]):
            raise ValueError(
                f"label must be (B, 1, *spatial) or (B, *spatial) for logits {tuple(logits.shape)}, "
                f"got {tuple(label.shape)}"
            )
        if annotated is not None and annotated.shape != (batch,):
            raise ValueError(f"annotated must be ({batch},), one value a sample, got {tuple(annotated.shape)}")
        label = label.long()
        if annotated is not None:
            annotated = annotated.to(logits.device, torch.bool)
            label = label * annotated.view(-1, *[1] * (label.ndim - 1))

        cross_entropy = F.cross_entropy(logits.float(), label, reduction="none").clamp(max=-self.log_floor)
        loss = (-torch.expm1(-cross_entropy)) ** self.gamma * cross_entropy  # 1 - p = -expm1(log p)
        loss = loss.flatten(1)  # (B, voxels)
        weight = self.weight if weight is None else weight
        if weight is not None:
            loss = loss * self._voxel_weights(weight.to(loss), label, channels)
        if annotated is None:
            return loss.mean()
        return (loss.mean(dim=1) * annotated).sum() / annotated.sum().clamp(min=1)

    @staticmethod
    def _voxel_weights(weight: Tensor, label: Tensor, channels: int) -> Tensor:
        """(B, voxels): the weight of each voxel's own class."""
        if weight.shape not in ((channels,), (len(label), channels)):
            raise ValueError(
                f"weight must be ({channels},) or ({len(label)}, {channels}), one value a channel, "
                f"got {tuple(weight.shape)}"
            )
        return weight.expand(len(label), channels).gather(1, label.flatten(1))
