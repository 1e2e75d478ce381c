from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from monai_petl.transforms import SelectClassesd

IDS = {"liver": 1, "spleen": 3, "kidney": 2}


def test_classes_are_numbered_in_the_order_given_and_the_rest_is_background() -> None:
    label = MetaTensor(torch.tensor([0, 1, 2, 3, 9]).view(1, 5, 1, 1), affine=2 * torch.eye(4))
    data = {"label": label, "image": "untouched"}
    result = SelectClassesd("label", IDS, ["spleen", "liver"])(data)
    assert result["label"].flatten().tolist() == [0, 2, 0, 1, 0]
    assert result["label"].dtype == torch.uint8
    assert torch.equal(result["label"].affine, label.affine)
    assert result["image"] == "untouched"
    assert data["label"] is label


def test_unknown_class_is_named_with_those_that_exist() -> None:
    transform = SelectClassesd("label", IDS, ["pancreas"])
    with pytest.raises(KeyError, match="unknown class 'pancreas'; the data set's classes are: liver, spleen, kidney"):
        transform({"label": torch.zeros(1, 2, 2, 2)})


def test_missing_label_is_an_error_unless_allowed() -> None:
    with pytest.raises(KeyError):
        SelectClassesd("label", IDS, ["liver"])({})
    assert SelectClassesd("label", IDS, ["liver"], allow_missing_keys=True)({}) == {}
