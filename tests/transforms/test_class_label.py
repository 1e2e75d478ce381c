"""SampleClassLabeld: which class is drawn, and what remains of the label."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from monai.data import MetaTensor

from monai_petl.transforms import SampleClassLabeld


def test_other_classes_become_background():
    sample = {"label": MetaTensor(torch.arange(24).view(1, 4, 3, 2) % 5), "image": torch.zeros(1, 4, 3, 2)}
    classes = {"spleen": 1, "liver": 3}
    transform = SampleClassLabeld("label", classes).set_random_state(0)
    drawn = set()
    for _ in range(10):
        result = transform(sample)
        drawn.add(result["class_name"])
        expected = sample["label"].as_tensor() == classes[result["class_name"]]
        assert torch.equal(result["label"].as_tensor(), expected.to(torch.uint8))
    assert drawn == set(classes)


def test_classes_are_drawn_with_equal_frequency():
    classes = {"spleen": 1, "left kidney": 2, "gallbladder": 3, "liver": 5}
    sample = {"label": torch.ones(1, 1, 1, 1)}
    transform = SampleClassLabeld("label", classes).set_random_state(0)
    drawn = Counter(transform(sample)["class_name"] for _ in range(10_000))
    assert set(drawn) == set(classes)
    chi_squared = sum((count - 2500) ** 2 / 2500 for count in drawn.values())
    assert chi_squared < 11.34  # the 1 % point for three degrees of freedom
    names = [transform.set_random_state(7)(sample)["class_name"] for _ in range(2)]
    assert names[0] == names[1]


def test_drawing_from_no_class_is_refused():
    with pytest.raises(ValueError, match="at least one class"):
        SampleClassLabeld("label", {})
