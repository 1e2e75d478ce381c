"""What MONAI Label asks of a bundle's configs, without a server: it sets a few ids and gives the cases itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_petl.data import class_names
from tests.bundles.helpers import SEGMENTERS, Bundle, named, parsed, state_in


@pytest.fixture(params=SEGMENTERS, ids=named)
def each(request: pytest.FixtureRequest) -> Bundle:
    """Every segmentation bundle in turn."""
    return request.param


def label_training(bundle: Bundle, root: Path, cases: list[dict[str, str]], **more: Any) -> Any:
    """A training as the server starts it: no data set's folder, one epoch, the device as a word."""
    overrides: dict[str, Any] = {
        "train#trainer#max_epochs": 1,
        "train#dataset#data": cases,
        "validate#dataset#data": [],
        "device": "cpu",
        "epochs": 300,
        "val_interval": 5,
        "lr": 0.05,
        **more,
    }
    return bundle.run("train", root, root / "no_data", **overrides)


@pytest.fixture
def case(each: Bundle, data: Path, tmp_path: Path) -> dict[str, str]:
    """A labelled case whose label has the numbers of the network's channels, and 0 elsewhere."""
    image = sorted((data / "imagesTr").iterdir())[0]
    label = nib.load(data / "labelsTr" / image.name)
    ids, values = class_names(data), np.asarray(label.dataobj)
    numbered = np.zeros_like(values)
    for value, name in enumerate(each.classes, 1):
        numbered[values == ids[name]] = value
    nib.save(nib.Nifti1Image(numbered, label.affine), tmp_path / "label.nii.gz")
    return {"image": str(image), "label": str(tmp_path / "label.nii.gz")}


def test_it_learns_from_one_label_from_the_model_that_is_there(
    each: Bundle, tmp_path: Path, case: dict[str, str]
) -> None:
    root = each.copy(tmp_path / "app")
    (root / "models").mkdir()
    network = parsed(each.workflow("train", root, root / "no_data"), "network_def")
    before = network.state_dict()
    model = root / "models" / "model.pt"
    torch.save(before, model)
    flow = label_training(each, root, [case])
    after = state_in(model)
    assert list(after) == list(before)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    trained = {name for name, p in parsed(flow, "adapted_network").named_parameters() if p.requires_grad}
    assert changed
    assert changed <= trained
    steps = parsed(flow, "lr_scheduler")
    total = getattr(steps, "total_steps", getattr(steps, "total_iters", None))
    assert total == each.settings["train"]["epoch_length"]  # of the one epoch, not of 300


def test_a_file_that_was_named_and_is_missing_is_not_replaced_by_the_model(
    each: Bundle, tmp_path: Path, case: dict[str, str]
) -> None:
    root = each.copy(tmp_path / "app")
    (root / "models").mkdir()
    torch.save(parsed(each.workflow("train", root, root), "network_def").state_dict(), root / "models" / "model.pt")
    with pytest.raises(RuntimeError) as error:
        label_training(each, root, [case], pretrained_path=str(tmp_path / "gone.pt"))
    assert "gone.pt" in str(error.value.__cause__)


def test_dropout_can_be_switched_on_for_scoring(each: Bundle, tmp_path: Path) -> None:
    network = parsed(each.workflow("inference", tmp_path, tmp_path, **{"network_def#dropout": 0.5}), "network_def")
    image = torch.rand(each.input_shape)
    with torch.no_grad():
        network.train()
        first, second = (torch.as_tensor(network(image)) for _ in range(2))
        assert not torch.equal(first, second)
        network.eval()
        assert torch.equal(network(image), network(image))


def test_metadata_names_every_channel_in_lower_case(each: Bundle) -> None:
    pred = each.config("metadata")["network_data_format"]["outputs"]["pred"]
    names = list(pred["channel_def"].values())
    assert names == [name.lower() for name in names]
    assert not any(word in each.name for word in ("deepedit", "deepgrow", "detection", "classification"))
    assert "displayable_configs" not in json.dumps(each.config("train"))
