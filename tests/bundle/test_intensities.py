"""Wrong words and numbers for the intensities stop a run; a misspelt word would leave them as they are."""

from __future__ import annotations

import json

import pytest

from monai_petl.bundle import BundleFolder, check_intensities
from tests.pipelines import BUNDLES

RIGHT = {"normalisation": "window", "intensity_window": [-175, 250], "spacing": [1.5, 1.5, 2.0]}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"normalisation": "foo"}, "normalisation must be one of window, percentile, zscore; got 'foo'"),
        ({"intensity_window": [250, -175]}, r"the lower one first, such as \[-175, 250\]; got \[250, -175\]"),
        ({"intensity_window": [0, 0]}, r"got \[0, 0\]"),
        ({"intensity_window": [1]}, r"must be two numbers.*got \[1\]"),
        ({"intensity_window": ["a", 1]}, "must be two numbers"),
        ({"spacing": [-1, 1, 1]}, r"spacing must be positive numbers of mm; got \[-1, 1, 1\]"),
        ({"spacing": [0, 1, 1]}, "positive"),
        ({"spacing": [float("nan"), 1, 1]}, "positive"),
    ],
)
def test_what_would_train_on_nonsense_is_refused(wrong, sentence):
    check_intensities(**RIGHT)
    with pytest.raises(ValueError, match=sentence):
        check_intensities(**{**RIGHT, **wrong})


@pytest.mark.parametrize("root", sorted(BUNDLES.glob("*_segmentation")), ids=lambda path: path.name)
def test_every_run_of_a_bundle_for_volumes_begins_with_it(root):
    assert BundleFolder(root)
    for file in (root / "configs").glob("*.json"):
        contents = json.loads(file.read_text(encoding="utf-8"))
        if "initialize" in contents:
            assert "monai_petl.bundle.check_intensities" in {
                item["_target_"] for item in contents["initialize"] if isinstance(item, dict)
            }, file
