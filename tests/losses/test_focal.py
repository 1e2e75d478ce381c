"""SampleWeightedFocalLoss against recorded numbers of the published loss, MONAI's FocalLoss and cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.losses import FocalLoss
from torch import Tensor

from monai_petl.losses import SampleWeightedFocalLoss
from tests.parity_cases import check, load_cases, load_expected, tensors

CASES = load_cases("cpa", kind="focal")


def sample(batch: int = 3, channels: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, channels, 6, 5, 2, generator=generator)
    return logits, torch.randint(0, channels, (batch, 1, 6, 5, 2), generator=generator)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_matches_the_published_loss(case):
    expected, config = load_expected("cpa"), case["config"]
    inputs = tensors(case, f"input.{case['name']}.")
    score = inputs["label_score"]
    label = score.argmax(dim=1) if config["label_rule"].startswith("argmax") else score > 0.4
    logits = inputs["logits"].requires_grad_()
    weight = config["alpha"] + torch.tensor(config["additive_alpha_per_sample"])
    loss = SampleWeightedFocalLoss(config["gamma"], log_floor=config["log_floor"])(logits, label, weight)
    loss.backward()
    check(expected, case, "loss", loss)
    if "grad.logits" in case["outputs"]:
        check(expected, case, "grad.logits", logits.grad)


def test_is_twice_the_focal_loss_of_monai_for_two_channels():
    logits, label = sample()
    weight = [1.0, 1.86]
    monai = FocalLoss(include_background=True, to_onehot_y=True, use_softmax=True, gamma=4.0, weight=weight)
    torch.testing.assert_close(SampleWeightedFocalLoss(weight=weight)(logits, label), 2 * monai(logits, label))


def test_is_the_cross_entropy_without_focus_and_weights():
    logits, label = sample(channels=4)
    expected = F.cross_entropy(logits, label[:, 0])
    torch.testing.assert_close(SampleWeightedFocalLoss(gamma=0.0)(logits, label), expected)


def test_each_sample_has_its_own_weights():
    logits, label = sample(batch=2)
    loss = SampleWeightedFocalLoss()
    weight = torch.tensor([[1.0, 2.0], [1.0, 5.0]])
    apart = [loss(logits[[i]], label[[i]], weight[i]) for i in range(2)]
    torch.testing.assert_close(loss(logits, label, weight), torch.stack(apart).mean())


def test_samples_without_annotation_are_left_out_with_their_weights():
    logits, label = sample()
    weight = torch.tensor([[1.0, 1.1], [1.0, 9.0], [1.0, 1.3]])
    label[1] = 255  # whatever stands there must not matter
    annotated = torch.tensor([True, False, True])
    logits.requires_grad_()
    loss = SampleWeightedFocalLoss()
    masked = loss(logits, label, weight, annotated)
    masked.backward()
    torch.testing.assert_close(masked, loss(logits[annotated], label[annotated], weight[annotated]))
    assert logits.grad[1].abs().max() == 0
    assert logits.grad[0].abs().max() > 0


def test_batch_without_any_annotation_costs_nothing():
    logits, label = sample()
    logits.requires_grad_()
    loss = SampleWeightedFocalLoss()(logits, label, annotated=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_label_type_and_metadata_do_not_matter(dtype):
    logits, label = sample()
    loss = SampleWeightedFocalLoss()
    expected = loss(logits, label)
    result = loss(MetaTensor(logits), MetaTensor(label.to(dtype)))
    assert type(result) is Tensor
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(loss(logits, label[:, 0].to(dtype)), expected)


def test_half_precision_logits_are_computed_in_float32():
    logits, label = sample()
    logits = logits.half()
    loss = SampleWeightedFocalLoss()
    assert loss(logits, label).dtype == torch.float32
    torch.testing.assert_close(loss(logits, label), loss(logits.float(), label))


def test_wrong_arguments_are_explained():
    logits, label = sample()
    loss = SampleWeightedFocalLoss()
    with pytest.raises(ValueError, match="label must be"):
        loss(logits, label[..., :1])
    with pytest.raises(ValueError, match="weight must be"):
        loss(logits, label, torch.ones(3, 3))
    with pytest.raises(ValueError, match="annotated must be"):
        loss(logits, label, annotated=torch.ones(2))
    with pytest.raises(ValueError, match="gamma must be 0 or at least 1"):
        SampleWeightedFocalLoss(gamma=-1.0)
    with pytest.raises(ValueError, match="must not be positive"):
        SampleWeightedFocalLoss(log_floor=1.0)
    with pytest.raises(ValueError, match="class weights must not be negative"):
        SampleWeightedFocalLoss(weight=[1.0, -1.0])
