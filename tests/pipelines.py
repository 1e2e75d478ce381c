"""What bundles read their data with, built from their own configs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.transforms import Compose

BUNDLES = Path(__file__).parents[1] / "bundles"


def transforms(bundle: str, config: str, ids: Sequence[str], **values: Any) -> Compose:
    """The transforms of these ids of a bundle's config, one after the other, with other values of its ids."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / bundle / "configs" / config))
    parser.update({"bundle_root": str(BUNDLES / bundle), **values})
    return Compose([transform for name in ids for transform in parser.get_parsed_content(name)])


def read_case(
    case: dict[str, Any],
    root: Path,
    spacing: Sequence[float],
    bundle: str = "lora_swin_unetr_segmentation",
    **values: Any,
) -> dict[str, Any]:
    """A case as validation reads it, up to the classes of its label: RAS, resampled to ``spacing`` (mm)."""
    ids = ["validate::deterministic_transforms", "validate::label_transforms"]
    defaults = {"dataset_dir": str(root), "class_names": ["liver", "spleen"], "spacing": list(spacing)}
    return transforms(bundle, "train.json", ids, **{**defaults, **values})(case)


def read_picture(path: Path, size: Sequence[int], bundle: str = "lora_vit_classification") -> Any:
    """A picture as inference reads it, (C, H, W) in 0..1 without the normalisation by mean and deviation."""
    values = {"dataset_dir": ".", "image_mean": [0, 0, 0], "image_std": [1, 1, 1], "img_size": list(size)}
    return transforms(bundle, "train.json", ["validate::deterministic_transforms"], **values)({"image": str(path)})[
        "image"
    ]
