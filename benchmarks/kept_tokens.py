"""What do the tokens that FPT+ keeps tell of an image, and what does the small image add? Breast ultrasound at 252 pixels.

Logistic regressions, without any side network: on means over the kept tokens, as stored, on means over all tokens, and on the
class token and the mean token behind the last block. Beside them FPT+ is trained as in the study ``busi_large``, with a side
network that sees a blank image.

    python benchmarks/kept_tokens.py --data cls_busi --weights dinov2_vits14.safetensors --features FOLDER

FOLDER is ``results/busi_large/features/fpt_plus``, made by ``results.py run busi_large``, or by the bundle's preload.json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import fire
import torch
from common import markdown, report
from monai.bundle import ConfigWorkflow
from prompt_ablation import CLASSES, regression
from studies import STUDIES
from torch import Tensor
from tqdm import tqdm

from monai_petl.compare.worker import run_job
from monai_petl.data import FeatureCache, load_image_list
from monai_petl.networks.vit.parts import first_tokens

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "fpt_vit_classification"
STUDY = "busi_large"
PARTS = ("keys", "values", "keys and values")
PROBE = "class token and mean token"


def main(data: str, weights: str, features: str, threads: int = 1) -> None:
    """
    Args:
        data: folder of the images, with sections.
        weights: file of the ViT-S/14 that the features are of.
        features: folder of stored features of all images.
        threads: of the processor.
    """
    torch.set_num_threads(threads)
    ids = {**STUDIES[STUDY].settings, **STUDIES[STUDY].methods["fpt_plus"]}
    ids |= {"dataset_dir": data, "pretrained_path": weights, "cache_dir": features}
    cases = {section: load_image_list(data, section, CLASSES) for section in ("training", "test")}
    labels = {section: torch.tensor([case["label"] for case in found]) for section, found in cases.items()}
    tokens = {section: {"kept": kept(found, features), "all": every(found, ids)} for section, found in cases.items()}
    training, test = tokens["training"], tokens["test"]

    def score(which: str, name: str, blocks: slice) -> float:
        x, y = (means(sets[which], name, blocks) for sets in (training, test))
        return regression(x, labels["training"], y, labels["test"])

    rows: dict[str, dict[str, float]] = {}
    for where, blocks in (("the last block", slice(-1, None)), ("all tapped blocks", slice(None))):
        for name in PARTS:
            rows[f"{name} of {where}"] = {which: score(which, name, blocks) for which in ("kept", "all")}
    rows[f"{PROBE} behind the last block"] = {"all": score("all", PROBE, slice(None))}
    blank = [blank_score({**ids, "seed": seed}) for seed in range(STUDIES[STUDY].seeds)]
    chance = float((1 / torch.bincount(labels["test"]).double()).sum().mul(0.8 * 0.2).sqrt() / len(CLASSES))
    reading = (
        f"FPT+ whose side network sees a blank image: {_percent(blank)}. With these test images a balanced accuracy near 80 % "
        f"has a standard error of {100 * chance:.1f} points."
    )
    record = {"rows": rows, "blank": blank, "standard_error": chance, "img_size": ids["img_size"]}
    report("kept_tokens", [table_of(rows)], reading, record)


def table_of(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The table of docs/methods/fpt.md."""
    head = ["logistic regression on means of", "the kept fifth of the tokens", "all tokens"]
    cells = ([_percent([row[which]]) if which in row else "" for which in ("kept", "all")] for row in rows.values())
    return markdown(head, ([name, *row] for name, row in zip(rows, cells, strict=True)))


def kept(cases: Sequence[Mapping[str, Any]], features: str) -> dict[str, Tensor]:
    """Means of keys and values over the tokens that are stored, (n, blocks, width) each."""
    settings = json.loads((Path(features) / "cache.json").read_text(encoding="utf-8"))
    cache = FeatureCache(features, settings, settings["dtype"])
    stored = [cache.read(case["image"]) for case in cases]
    return {
        name: torch.stack([one[f"{name[:-1]}_states"].float().mean(2).flatten(1) for one in stored])
        for name in ("keys", "values")
    }


@torch.no_grad()
def every(cases: Sequence[Mapping[str, Any]], ids: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same over all tokens, by a pass of the transformer; and the class token beside the mean of the others."""
    parser = _parser({**ids, "cache_dir": None})
    network, transform = (
        parser.get_parsed_content(f"{name}") for name in ("adapted_network", "validate::preprocessing")
    )
    vit, seen = network.backbone.eval(), []
    for number in network.layers:
        vit.blocks[number].attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output.mean(1)))
    found: dict[str, list[Tensor]] = {"keys": [], "values": [], PROBE: []}
    for case in tqdm(cases, "tokens", disable=None):
        image = transform(dict(case))["source"].as_tensor()[None]
        tokens, _ = first_tokens(vit, image, network.backbone_size(), 0.1)
        for block in vit.blocks:
            tokens = block(tokens)
        tokens = vit.norm(tokens)
        _, keys, values = torch.cat(seen).chunk(3, 1)  # (blocks, width) each
        for name, value in (
            ("keys", keys),
            ("values", values),
            (PROBE, torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)))),
        ):
            found[name].append(value)
        seen.clear()
    return {name: torch.stack(values) for name, values in found.items()}


def means(found: Mapping[str, Tensor], name: str, blocks: slice) -> Tensor:
    """Those of some blocks, (n, channels)."""
    parts = [name] if name in found else name.split(" and ")
    return torch.cat([found[part][:, blocks].flatten(1) for part in parts], 1)


def blank_score(ids: Mapping[str, Any]) -> float:
    """Balanced accuracy on the test images of FPT+ from stored features, where all pixels of the small image are 0."""
    transforms = _parser(ids).config["train"]["deterministic_transforms"]
    scaling = next(n for n, one in enumerate(transforms) if one["_target_"] == "ScaleIntensityRanged")
    with tempfile.TemporaryDirectory() as work:
        job = {"bundle": str(BUNDLE), "factor": 1.0, "section": "test", "device": "cpu", "work": work, "pictures": 0}
        return run_job({**job, "ids": {**ids, f"train::deterministic_transforms::{scaling}::b_max": 0.0}})["quality"]


def _parser(ids: Mapping[str, Any]) -> Any:
    workflow = ConfigWorkflow(
        config_file=str(BUNDLE / "configs" / "train.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(BUNDLE),
        **ids,
    )
    workflow.initialize()
    return workflow.parser


def _percent(values: Sequence[float]) -> str:
    text = f"{100 * mean(values):.1f}"
    return f"{text} ± {100 * stdev(values):.1f}" if len(values) > 1 else text


if __name__ == "__main__":
    fire.Fire(main)
