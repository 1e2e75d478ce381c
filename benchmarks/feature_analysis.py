"""What tuning from few images does to features of real ones: norms of tokens, gates, how far classes lie apart, calibration.

    python benchmarks/feature_analysis.py --data cls_busi --weights dinov2_vits14.safetensors

Every method trains from the same draws of ten images a class; all is measured on the test images. The pictures of
docs/analysis.md are of the first draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import fire
import torch
from common import markdown, report
from prompt_ablation import CLASSES, features_of, ids_of, parser_of, read_sets, train
from torch import Tensor
from tqdm import tqdm

from monai_petl.analysis import (
    expected_calibration_error,
    linear_cka,
    nearest_centroid_accuracy,
    outliers,
    plot_features,
    plot_gates,
    plot_norms,
    scaling_conditions,
    separation,
    spread,
    token_norms,
)
from monai_petl.data import few_shot_per_class
from monai_petl.methods import attention_gates, parameter_groups

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
ARMS: dict[str, tuple[str, dict[str, Any], float, float]] = {  # method, options, rates of deltas and backbone
    "head": ("head", {}, 0.0, 0.0),
    "EPT": ("ept", {"init": 4.0}, 0.1, 0.0),
    "VPT": ("vpt", {}, 5e-3, 0.0),
    "LoRA": ("lora", {}, 1e-3, 0.0),
    "full": ("full", {}, 0.0, 1e-5),
}
SHOTS, RATE = 10, 3e-3  # images a class; learning rate of the head
COLUMNS = {
    "fisher": "between / within",
    "same": "distance, one class",
    "cross": "distance, two classes",
    "gap": "gap in a class, %",
    "bimodality": "bimodality",
    "centroid": "nearest mean, %",
    "accuracy": "classifier, %",
    "ece": "calibration error, %",
    "norm": "norm of a patch",
    "outliers": "outliers, %",
    "cka": "CKA with untouched",
}


def main(
    data: str, weights: str, image: int = 126, draws: int = 3, steps: int = 100, batch: int = 8, threads: int = 1
) -> None:
    """
    Args:
        data: folder of the images, with sections.
        weights: file of a ViT-S/14.
        image: edge of the image in pixels.
        draws: of the labelled images, and seeds of the training.
        steps: of a training.
        batch: images a step.
        threads: of the processor.
    """
    torch.set_num_threads(threads)
    ids = ids_of(data, weights, image)
    parser = parser_of(ids, "head")
    cases, sets = read_sets(data, parser)
    places = {case["image"]: place for place, case in enumerate(cases["training"])}
    plain = parser.get_parsed_content("adapted_network").eval()
    before = features_of(plain, sets["test"][0])
    pictures = sets["test"][0]
    rows: dict[str, list[dict[str, float]]] = {"untouched": []}
    norms = token_norms(plain, pictures)
    blocks: dict[str, list[list[float]]] = {
        "norm of a patch, untouched": [_median(norms)],
        "patches larger by a quarter, %, untouched": [_share_of_large(norms)],
    }
    shown: dict[str, Any] = {"norms": {"untouched": norms[:, :, 1:]}, "features": {"untouched": before}}
    for seed in range(draws):
        drawn = few_shot_per_class(cases["training"], SHOTS, seed)
        chosen = torch.tensor([places[case["image"]] for case in drawn])
        labelled = tuple(tensor[chosen] for tensor in sets["training"])
        rows["untouched"].append(_measured(plain, labelled, sets["test"], before, head=False))
        for name, (method, options, delta_lr, backbone_lr) in tqdm(ARMS.items(), f"draw {seed}", disable=None):
            torch.manual_seed(seed)
            network = parser_of(ids, method, options).get_parsed_content("adapted_network")
            if method == "ept" and seed == 0:
                _describe_gates(network, pictures, "at the start", blocks)
            groups = parameter_groups(network, ["head"], RATE, delta_lr, backbone_lr, 1e-3)
            optimizer = torch.optim.AdamW([group for group in groups if group["params"]], eps=1e-16)
            train(network, *labelled, optimizer, steps, batch)
            rows.setdefault(name, []).append(_measured(network, labelled, sets["test"], before))
            if method == "ept":
                gates = _describe_gates(network, pictures, "tuned", blocks)
                shown.setdefault("gates", gates)
            if seed == 0 and method != "head":
                shown["norms"][name] = token_norms(network.eval(), pictures)[:, :, 1:]
                shown["features"][name] = features_of(network, pictures)
    side = image // 14
    plot_norms(shown["norms"]).savefig(FIGURES / "analysis_norms.png", dpi=110)
    plot_gates(shown["gates"], (side, side)).savefig(FIGURES / "analysis_gates.png", dpi=110)
    plot_features(shown["features"], sets["test"][1], CLASSES).savefig(FIGURES / "analysis_features.png", dpi=110)
    best = max(rows, key=lambda name: mean(row["fisher"] for row in rows[name]))
    untouched = _cells(rows["untouched"], ["fisher"])[0]
    reading = f"{best} has the largest ratio of the scatters; untouched features have {untouched}."
    record = {"rows": rows, "blocks": blocks, "image": image, "draws": draws, "steps": steps}
    report("feature_analysis", [table_of(rows), blocks_of(blocks)], reading, record)


def table_of(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The table of docs/analysis.md."""
    keys = [key for key in COLUMNS if any(key in row for found in rows.values() for row in found)]
    return markdown(
        ["", *(COLUMNS[key] for key in keys)], ([name, *_cells(found, keys)] for name, found in rows.items())
    )


def blocks_of(blocks: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """The second table of docs/analysis.md: a column a block, means over the draws."""
    rows = []
    for name, found in blocks.items():
        means = [mean(values) for values in zip(*found, strict=True)]
        digits = 0 if "%" in name else 1 if "norm" in name else 2
        rows.append([name, *([""] * (12 - len(means))), *(f"{value:.{digits}f}" for value in means)])
    return markdown(["block", *map(str, range(1, 13))], rows)


def _median(norms: Tensor) -> list[float]:
    return norms[:, :, 1:].flatten(1).median(1).values.tolist()


def _share_of_large(norms: Tensor) -> list[float]:
    """Patches whose norm is a quarter above the median of their image, per cent in each block."""
    patches = norms[:, :, 1:]
    return (100 * (patches > 1.25 * patches.median(2, keepdim=True).values).double().mean((1, 2))).tolist()


def _describe_gates(network: Any, pictures: Tensor, when: str, blocks: dict[str, list[list[float]]]) -> Tensor:
    """Note mean gates of patches, and whether of two patches of an image the larger one is turned down more."""
    gates, norms = attention_gates(network.eval(), pictures), token_norms(network, pictures)[:, :, 1:]
    patches = gates.mean(2)[:, :, 1:]
    blocks.setdefault(f"mean gate, {when}", []).append(patches.mean((1, 2)).tolist())
    images = torch.zeros(patches.shape[2], dtype=torch.long)
    agree = [
        [scaling_conditions(size, scale, images).shrinks_large for size, scale in zip(before, behind, strict=True)]
        for before, behind in zip(norms[:-1], patches[1:], strict=True)  # sizes as the block before left them
    ]
    blocks.setdefault(f"pairs whose larger patch is turned down more, %, {when}", []).append(
        [100 * mean(shares) for shares in agree]
    )
    return gates


@torch.no_grad()
def _measured(
    network: Any, labelled: Sequence[Tensor], test: Sequence[Tensor], before: Tensor, head: bool = True
) -> dict[str, float]:
    """What :data:`COLUMNS` names, of the test images; an untrained head has no scores."""
    pictures, wanted = test
    features, own = features_of(network, pictures), features_of(network, labelled[0])
    apart, norms = separation(features, wanted), token_norms(network.eval(), pictures)[-1, :, 1:]
    spreads = [spread(features[wanted == label]) for label in wanted.unique()]
    found = {
        "fisher": apart.fisher,
        "same": apart.same_distance,
        "cross": apart.cross_distance,
        "gap": mean(found.gap for found in spreads),
        "bimodality": mean(found.bimodality for found in spreads),
        "centroid": nearest_centroid_accuracy(own, labelled[1], features, wanted),
        "norm": float(norms.median()),
        "outliers": float(outliers(norms).double().mean()),
        "cka": linear_cka(features, before),
    }
    if not head:
        return found
    said = network.head(features).softmax(1)
    hit = said.argmax(1) == wanted
    found["accuracy"] = mean(float(hit[wanted == label].double().mean()) for label in wanted.unique())
    found["ece"] = expected_calibration_error(said, wanted)
    return found


def _cells(found: Sequence[Mapping[str, float]], keys: Sequence[str]) -> list[str]:
    cells = []
    for key in keys:
        factor, digits = (100, 1) if COLUMNS[key].endswith("%") else (1, 2)
        values = [factor * row[key] for row in found if key in row]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and stdev(values) > 0 else ""
        cells.append(f"{mean(values):.{digits}f}{spread}" if values else "")
    return cells


if __name__ == "__main__":
    fire.Fire(main)
