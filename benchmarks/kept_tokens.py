"""What the tokens that FPT+ keeps tell of an image: logistic regressions on stored features, without any side network.

    python benchmarks/kept_tokens.py --data cls_busi --features results/busi_large/features/fpt_plus

The folder of features is what ``results.py run busi_large`` (or the bundle's preload.json) makes; no transformer is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fire
import torch
from common import markdown, report
from prompt_ablation import CLASSES, regression
from torch import Tensor

from monai_petl.data import FeatureCache, load_image_list


def main(data: str, features: str, threads: int = 1) -> None:
    """
    Args:
        data: folder of the images, with sections.
        features: folder of stored features of all of them.
        threads: of the processor.
    """
    torch.set_num_threads(threads)
    settings = json.loads((Path(features) / "cache.json").read_text(encoding="utf-8"))
    cache = FeatureCache(features, settings, settings["dtype"])
    sets = {section: read(cache, data, section) for section in ("training", "test")}
    rows: dict[str, float] = {}
    for blocks, chosen in (("the last block", slice(-1, None)), ("all tapped blocks", slice(None))):
        for name in ("keys", "values", "keys and values"):
            x, test = (means(sets[section], name, chosen) for section in ("training", "test"))
            rows[f"{name} of {blocks}"] = regression(x, sets["training"]["label"], test, sets["test"]["label"])
    best = max(rows, key=rows.__getitem__)
    report("kept_tokens", [table_of(rows)], f"Best are {best}.", {"rows": rows, "img_size": settings["img_size"]})


def table_of(rows: dict[str, float]) -> str:
    """The table of docs/methods/fpt.md."""
    head = ["mean over the kept tokens", "balanced accuracy, %"]
    return markdown(head, ([name, f"{100 * value:.1f}"] for name, value in rows.items()))


def read(cache: FeatureCache, data: str, section: str) -> dict[str, Tensor]:
    """Means over the kept tokens, (n, blocks, width), and labels (n,)."""
    cases = load_image_list(data, section, CLASSES)
    stored = [cache.read(case["image"]) for case in cases]
    found: dict[str, Any] = {
        name: torch.stack([one[f"{name[:-1]}_states"].float().mean(2).flatten(1) for one in stored])
        for name in ("keys", "values")
    }
    return {**found, "label": torch.tensor([case["label"] for case in cases])}


def means(found: dict[str, Tensor], name: str, blocks: slice) -> Tensor:
    """Those of some blocks, (n, channels)."""
    return torch.cat([found[part][:, blocks].flatten(1) for part in name.split(" and ")], 1)


if __name__ == "__main__":
    fire.Fire(main)
