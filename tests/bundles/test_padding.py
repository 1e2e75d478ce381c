"""A volume smaller than the patch is surrounded by the same intensity in training and in inference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "bundles" / "punet_ct_segmentation" / "configs"


@pytest.mark.parametrize(
    ("config", "inferer"),
    [("train", ("validate", "inferer")), ("pretrain", ("validate", "inferer")), ("inference", ("inferer",))],
)
def test_windows_beyond_the_volume_hold_the_padding_of_training(config: str, inferer: tuple[str, ...]) -> None:
    contents = json.loads((CONFIGS / f"{config}.json").read_text(encoding="utf-8"))
    expected = contents["pad_value"]
    node = contents
    for key in inferer:
        node = node[key]
    assert node["cval"] == "@pad_value"
    assert expected == json.loads((CONFIGS / "train.json").read_text(encoding="utf-8"))["pad_value"]
    if config != "inference":
        pads = [t for t in contents["train"]["slab_transforms"] if t["_target_"] == "SpatialPadd"]
        assert [t["value"] for t in pads if t["keys"] == "image"] == ["@pad_value"]
