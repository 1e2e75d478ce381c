"""Do embedded prompts learn more than one fixed amount by which attention is turned down? On real images, with real weights.

The gate of EPT is fixed at several values, the same for all blocks and places, and nothing but a logistic regression on the
class token is trained. Beside it stand prompts that were trained from a few images of each class, whose features go to the same
regression.

    python benchmarks/prompt_ablation.py --data cls_busi --weights dinov2_vits14.safetensors
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import fire
import torch
import torch.nn.functional as F
from common import markdown, report
from monai.bundle import ConfigWorkflow
from torch import Tensor
from tqdm import tqdm

from monai_petl.analysis import linear_cka, separation
from monai_petl.core.deltas import deltas_of
from monai_petl.data import few_shot_per_class, load_image_list
from monai_petl.methods import attention_gates, parameter_groups

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "ept_vit_classification"
CLASSES = ["normal", "benign", "malignant"]
VIT_S = {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6, "num_workers": 0, "token_size": [14, 14]}
SHOTS = (1, 5, 10)
COLUMNS = (1, 20, 100, 300, 600)  # of prompts that stay where the published ones start
TRAINED: dict[str, tuple[dict[str, Any], float | None]] = {  # options, rate of AdamW; None for the published optimiser
    "trained by AdamW from an open gate": ({"init": "identity"}, 0.1),
    "trained by AdamW from an open gate, rate 1": ({"init": "identity"}, 1.0),
    "trained by AdamW from 100 columns": ({"init": math.log(100)}, 0.1),
    "trained as published, 100 columns": ({"init": "published", "num_columns": 100}, None),
}


def main(
    data: str, weights: str, image: int = 126, draws: int = 5, steps: int = 50, batch: int = 8, threads: int = 1
) -> None:
    """
    Args:
        data: folder of the images, with sections.
        weights: file of a ViT-S/14.
        image: edge of the image in pixels.
        draws: of the labelled images, and seeds of the training.
        steps: of a training of prompts and head.
        batch: images a step.
        threads: of the processor.
    """
    torch.set_num_threads(threads)
    ids = ids_of(data, weights, image)
    parser = parser_of(ids, "ept")
    cases, sets = read_sets(data, parser)
    places = {case["image"]: place for place, case in enumerate(cases["training"])}
    drawn = {
        (shots, seed): torch.tensor([places[c["image"]] for c in few_shot_per_class(cases["training"], shots, seed)])
        for shots in SHOTS
        for seed in range(draws)
    }
    frozen = parser.get_parsed_content("adapted_network").eval()
    rows: dict[str, dict[str, Any]] = {}
    plain = None
    fixed: dict[str, float | None] = {"no prompts": None}
    fixed |= {f"fixed at {count} column{'s' * (count > 1)}": math.log(count) for count in COLUMNS}
    for name, start in tqdm(fixed.items(), "fixed gates", disable=None):
        for _, delta in deltas_of(frozen):
            delta.enabled = delta.active = start is not None
            delta.logits.data.fill_(start or 0.0)
        features = {section: features_of(frozen, pictures) for section, (pictures, _) in sets.items()}
        plain = features if plain is None else plain
        gates = _mean_gate(frozen, sets["test"][0]) if start is not None else 1.0
        rows[name] = _scores(features, sets, drawn, plain["test"], gates)
    for name, (options, rate) in TRAINED.items():
        found: list[dict[str, Any]] = []
        for seed in tqdm(range(draws), name, disable=None):
            torch.manual_seed(seed)
            network = parser_of(ids, "ept", options).get_parsed_content("adapted_network")
            chosen = drawn[10, seed]
            optimizer = _optimizer(network, rate)
            train(network, *(tensor[chosen] for tensor in sets["training"]), optimizer, steps, batch)
            features = {"training": torch.zeros_like(plain["training"]), "test": features_of(network, sets["test"][0])}
            features["training"][chosen] = features_of(network, sets["training"][0][chosen])
            gates = _mean_gate(network, sets["test"][0])
            found.append(_scores(features, sets, {(10, seed): chosen}, plain["test"], gates))
        rows[name] = {key: [value for one in found for value in one[key]] for key in found[0]}
    best, trained = (
        max((name for name in rows if name.startswith(kind)), key=lambda name: mean(rows[name]["10"]))
        for kind in ("fixed", "trained")
    )
    said = ", ".join(f"{name} {_cell(rows[name]['10'], '10')}" for name in ("no prompts", best, trained))
    reading = f"Balanced accuracy with 10 images a class, of the best fixed gate and the best trained prompts: {said}."
    report("prompt_ablation", [table_of(rows)], reading, {"rows": rows, "image": image, "draws": draws, "steps": steps})


def ids_of(data: str, weights: str, image: int) -> dict[str, Any]:
    """Top-level ids of the bundle for a ViT-S/14 on images of this edge."""
    return {
        "dataset_dir": data,
        "pretrained_path": weights,
        "img_size": [image, image],
        "class_names": CLASSES,
        **VIT_S,
    }


def parser_of(ids: Mapping[str, Any], method: str, options: Mapping[str, Any] | None = None) -> Any:
    """The bundle's training config, ready to build its parts."""
    workflow = ConfigWorkflow(
        config_file=str(BUNDLE / "configs" / "train.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(BUNDLE),
        method=method,
        method_options=dict(options or {}),
        **ids,
    )
    workflow.initialize()
    return workflow.parser


def read_sets(data: str, parser: Any) -> tuple[dict[str, list[Any]], dict[str, tuple[Tensor, Tensor]]]:
    """Cases by section, and their images (n, 3, H, W) and labels (n,)."""
    cases = {section: load_image_list(data, section, CLASSES) for section in ("training", "test")}
    transform = parser.get_parsed_content("validate::preprocessing")
    sets = {}
    for section, found in cases.items():
        pictures = torch.stack(
            [transform(dict(case))["image"].as_tensor() for case in tqdm(found, section, disable=None)]
        )
        sets[section] = (pictures, torch.tensor([case["label"] for case in found]))
    return cases, sets


@torch.no_grad()
def features_of(network: Any, pictures: Tensor) -> Tensor:
    """Class tokens (n, D) behind the last norm."""
    network.eval()
    return torch.cat([network.features(part) for part in pictures.split(16)])


def _mean_gate(network: Any, pictures: Tensor) -> list[float]:
    return [float(attention_gates(network.eval(), pictures).mean())]


def _scores(
    features: Mapping[str, Tensor],
    sets: Mapping[str, tuple[Tensor, Tensor]],
    drawn: Mapping[tuple[int, int], Tensor],
    plain: Tensor,
    gates: Sequence[float] | float,
) -> dict[str, list[float]]:
    """Accuracy of a regression for every draw, and how the test features lie."""
    (_, labels), (_, wanted) = sets["training"], sets["test"]
    found: dict[str, list[float]] = {"gate": gates if isinstance(gates, list) else [gates]}
    for (shots, _), chosen in drawn.items():
        score = regression(features["training"][chosen], labels[chosen], features["test"], wanted)
        found.setdefault(str(shots), []).append(score)
    if len(drawn) > 1:
        found["all"] = [regression(features["training"], labels, features["test"], wanted)]
    apart = separation(features["test"], wanted)
    return {
        **found,
        "fisher": [apart.fisher],
        "collapse": [apart.collapse],
        "cka": [linear_cka(features["test"], plain)],
    }


def regression(x: Tensor, y: Tensor, test: Tensor, wanted: Tensor, decay: float = 1e-2) -> float:
    """Balanced accuracy of a logistic regression on standardised features, every class of equal weight."""
    average, deviation = x.mean(0), x.std(0) + 1e-6
    x, test = (((features - average) / deviation).double() for features in (x, test))
    weight = torch.zeros(len(CLASSES), x.shape[1] + 1, dtype=torch.double, requires_grad=True)
    balance = 1 / torch.bincount(y, minlength=len(CLASSES)).double()
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight[:, 1:], weight[:, 0]), y, weight=balance)
        loss = loss + decay * weight[:, 1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        said = F.linear(test, weight[:, 1:], weight[:, 0]).argmax(1)
    return mean(float((said[wanted == label] == label).double().mean()) for label in wanted.unique())


def table_of(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The table of docs/methods/ept.md."""
    head = ["", "mean gate", *(f"{shots} a class" for shots in SHOTS), "all", "Fisher ratio", "NC1", "CKA"]
    keys = ["gate", *map(str, SHOTS), "all", "fisher", "collapse", "cka"]
    return markdown(head, ([name, *(_cell(row.get(key, []), key) for key in keys)] for name, row in rows.items()))


def _optimizer(network: Any, rate: float | None) -> torch.optim.Optimizer:
    if rate is None:
        parameters = [p for p in network.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=6e-4, momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(parameter_groups(network, ["head"], 1e-3, rate, 1e-3), eps=1e-16)


def train(
    network: Any, pictures: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, steps: int, batch: int
) -> None:
    """Steps on a random batch each, the rate falling to nothing along half a cosine."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,))
        F.cross_entropy(network(pictures[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _cell(values: Sequence[float], key: str) -> str:
    if not values:
        return ""
    factor, digits = (100, 1) if key in ("all", *map(str, SHOTS)) else (1, 2)
    text = f"{factor * mean(values):.{digits}f}"
    return f"{text} ± {factor * stdev(values):.{digits}f}" if len(values) > 1 and digits == 1 else text


if __name__ == "__main__":
    fire.Fire(main)
