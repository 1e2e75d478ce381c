"""The studies of docs/results.md: which bundle learns what, by which methods, from how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from monai_petl.methods import PUNET_METHODS

__all__ = ["STUDIES", "Study"]

Ids = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """A comparison on real data.

    Args:
        bundle: name of its folder.
        data: name of the data set's folder.
        methods: label -> top-level ids; ``bundle`` is the name of another bundle's folder, ``cache_dir`` that of
            stored features, which are made first.
        settings: top-level ids that all share.
        shots: numbers of labelled cases; ``None`` for all.
        seeds: how many.
        budget: trials of the learning rates, see :func:`monai_petl.compare.compare`.
        section: of the data list, for the scores.
        weights: whether the file of pre-trained weights is what trainings start from.
        pretraining: ids of the bundle's pretrain.json, where trainings start from what that makes.
        report: whether the report is published; its pictures need ``attribution``.
        title, attribution, pictures: see :func:`monai_petl.compare.compare`.
    """

    bundle: str
    data: str
    methods: Mapping[str, Ids]
    settings: Ids
    shots: tuple[int | None, ...] = (3, None)
    seeds: int = 3
    budget: int = 1
    section: str = "test"
    weights: bool = True
    pretraining: Ids = field(default_factory=dict)
    report: bool = False
    title: str | None = None
    attribution: str = ""
    pictures: int = 0


HIPPOCAMPUS_SOURCE = (
    "Images: Medical Segmentation Decathlon, Task04 Hippocampus (Antonelli et al., Nature Communications 13, 4128, 2022), "
    "CC BY-SA 4.0; these pictures are under the same licence."
)
BUSI_SOURCE = (
    "Images: breast ultrasound of Baheya Hospital (Al-Dhabyani et al., Data in Brief 28, 104863, 2020), CC BY 4.0."
)
VIT_S = {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6, "num_workers": 0}
VOLUMES = {
    "normalisation": "percentile",
    "epochs": 4,
    "epoch_length": 25,
    "cache_rate": 1.0,
    "affine_prob": 0.0,
    "lr": 2e-3,
}
HIPPOCAMPUS = {"class_names": ["anterior hippocampus", "posterior hippocampus"]}
BRAIN = {"class_names": ["csf", "cortical grey matter", "white matter", "deep grey matter"]}
INFLATED = {**VIT_S, **VOLUMES, "token_size": [14, 14, 5], "batch_size": 2, "samples_per_volume": 2, "sw_batch_size": 4}
SLICED = {**VIT_S, **VOLUMES, "token_size": [14, 14], "batch_size": 1, "samples_per_volume": 2, "sw_batch_size": 1}


def window(spacing: list[float], size: list[int]) -> dict[str, Any]:
    """What the network sees at once: ``size`` voxels of ``spacing`` mm."""
    return {"spacing": spacing, "patch_size": size, "slab_size": size}


FULL = {"method": "full", "backbone_lr": 1e-5}  # layer scale is folded into the weights: Adam's steps must be smaller
METHODS: dict[str, Ids] = {  # with the better one of two learning rates, which "hippocampus_rates" found
    "head": {"method": "head"},
    "lora": {"method": "lora", "delta_lr": 1e-3},
    "vpetl": {"method": "vpetl", "delta_lr": 1e-3},
    "ffn_adapter": {"method": "ffn_adapter", "delta_lr": 1e-3},
    "vpt": {"method": "vpt", "delta_lr": 5e-3},
    "ssf": {"method": "ssf", "delta_lr": 1e-3},
    "bias": {"method": "bias", "backbone_lr": 1e-3},
    "norm": {"method": "norm", "backbone_lr": 5e-3},
    "last_blocks": {"method": "last_blocks", "backbone_lr": 1e-4},
    "full": FULL,
}
RATES: dict[str, Ids] = {
    **{
        f"{method}, {rate:g}": {"method": method, name: rate}
        for name, rates, methods in (
            ("delta_lr", (1e-3, 5e-3), ("lora", "vpetl", "ffn_adapter", "vpt", "ssf")),
            ("backbone_lr", (1e-3, 5e-3), ("bias", "norm")),
            ("backbone_lr", (1e-5, 1e-4), ("last_blocks", "full")),
            ("lr", (2e-3, 5e-3), ("head",)),
        )
        for method in methods
        for rate in rates
    }
}
AIM: dict[str, Ids] = {
    "head": METHODS["head"],
    "lora": METHODS["lora"],
    "aim": {"method": "aim", "delta_lr": 3e-4},  # which "slices_rates" found
    "full": FULL,
}
AIM_RATES: dict[str, Ids] = {f"aim, {rate:g}": {"method": "aim", "delta_lr": rate} for rate in (3e-4, 1e-3)}
INFLATION: dict[str, Ids] = {
    "frozen, center": {"method": "head"},
    "frozen, average": {"method": "head", "inflation": "average"},
    "full, center": FULL,
    "full, average": {**FULL, "inflation": "average"},
    "scratch": {"method": "scratch", "backbone_lr": 5e-4},
}
VOLUME = {"center_slice": False}  # all slices of a window are predicted, as SAN does
SIDE_NETWORK = {"bundle": "san_vit_segmentation", "method": "head", "lr": 1e-3, "deep_supervision": False}
SAN: dict[str, Ids] = {
    "san": SIDE_NETWORK,
    "san, masks alone": {**SIDE_NETWORK, "recognition": False},
    "decoder": {**METHODS["head"], **VOLUME},
    "lora": {**METHODS["lora"], **VOLUME},
    "full": {**FULL, **VOLUME},
}
PICTURES = {**VIT_S, "token_size": [14, 14], "batch_size": 8, "epochs": 2, "lr": 3e-3}


def tried(method: str, rate: str, values: tuple[float, ...], **options: Any) -> dict[str, Ids]:
    """A method with several values of one of its learning rates."""
    return {f"{value:g}": {"method": method, rate: value, **options} for value in values}


FEW: dict[str, dict[str, Ids]] = {  # method -> what was tried in "busi_rates"
    "head": tried("head", "lr", (3e-3, 1e-2)),
    "ept": {
        "open": {"method": "ept"},
        "turned down": {"method": "ept", "method_options": {"init": 4.0}},  # by a tenth, as some 55 published columns
    },
    "vpt": tried("vpt", "delta_lr", (1e-3, 5e-3)),
    "vpt, shallow": tried("vpt", "delta_lr", (1e-3, 5e-3), method_options={"deep": False}),
    "lora": tried("lora", "delta_lr", (1e-3, 5e-3)),
    "ffn_adapter": tried("ffn_adapter", "delta_lr", (1e-3, 5e-3)),
    "bias": tried("bias", "backbone_lr", (1e-3, 5e-3)),
    "full": tried("full", "backbone_lr", (1e-5, 1e-4)),
}
FEW_RATES: dict[str, Ids] = {f"{label}, {name}": ids for label, choices in FEW.items() for name, ids in choices.items()}
FEW_METHODS: dict[str, Ids] = {
    label: FEW_RATES[f"{label}, {chosen}"]
    for label, chosen in {
        "head": "0.01",
        "ept": "turned down",  # level with "open", which is the head alone to the digit
        "vpt": "0.001",
        "vpt, shallow": "0.001",
        "lora": "0.005",
        "ffn_adapter": "0.001",
        "bias": "0.001",
        "full": "1e-05",
    }.items()
}
FEW_PICTURES = {**PICTURES, "epoch_length": 15, "img_size": [112, 112], "affine_prob": 0.0}
LARGE = {**PICTURES, "epoch_length": 15, "img_size": [252, 252]}
STORED = {"epochs": 6, "epoch_length": 50, "batch_size": 16, "side_size": [126, 126], "pretrained_size": [518, 518]}
SIDE: dict[str, Ids] = {
    "fpt_plus": {"method": "fpt_plus", "cache_dir": "features/fpt_plus", **STORED, "epochs": 12},
    "fpt": {"method": "fpt", "cache_dir": "features/fpt", **STORED},
    "side": {"method": "side", **STORED, "epochs": 12},
}
LARGE_RATES: dict[str, Ids] = {
    f"{name}, {rate:g}": {**ids, "epochs": 6, "lr": rate} for name, ids in SIDE.items() for rate in (5e-4, 2e-3)
}
WHOLE = {"bundle": "lora_vit_classification", "affine_prob": 0.0}
LARGE_METHODS: dict[str, Ids] = {
    **{name: {**ids, "lr": 2e-3} for name, ids in SIDE.items()},
    "head": {**WHOLE, "method": "head", "lr": 1e-2},
    "lora": {**WHOLE, "method": "lora", "delta_lr": 1e-3},  # 5e-3, better at 112 pixels, diverges here
    "full": {**WHOLE, **FULL},
}
RADIOGRAPHS: dict[str, Ids] = {name: {**ids, "epochs": 3 if name in SIDE else 1} for name, ids in LARGE_METHODS.items()}
SHARPER = {"cache_dir": "features/fpt_plus_504", "img_size": [504, 504]}  # what the files hold
RADIOGRAPHS["fpt_plus, 504 px"] = {**RADIOGRAPHS["fpt_plus"], **SHARPER}

PROMPTS = {"lr": 5e-2, "prompt_init": "mean"}
PUNET: dict[str, Ids] = {  # learning rates chosen on the validation cases of the hippocampus, 10 volumes
    name: {"method": name, **options}
    for name, options in {
        **dict.fromkeys(PUNET_METHODS, PROMPTS),
        "prompt_bias": {"lr": 2e-2, "prompt_init": "mean"},
        "head": {"lr": 1e-1},
        "bias": {"lr": 2e-2},
        "adapter": {"lr": 5e-3},
        "decoder": {"lr": 2e-3},
        "full": {"lr": 5e-4, "prompt_init": "mean"},
        "full_head": {"lr": 1e-3},
        "scratch": {"lr": 1e-3},
    }.items()
    if name != "lora"
}
PUNET_HIPPOCAMPUS = {
    "base_classes": ["anterior hippocampus"],
    "spacing": [1.0, 1.0, 1.0],
    "normalisation": "percentile",
    "patch_size": [48, 64, 1],
    "slab_size": [48, 64, 1],
    "num_workers": 0,
    "cache_rate": 1.0,
}
PUNET_CT = {
    "base_classes": ["vertebrae", "back_muscle", "gluteus", "hip_bone", "colon"],
    "spacing": [3.0, 3.0, 3.0],
    "intensity_window": [-200, 300],
    "patch_size": [64, 112, 1],
    "slab_size": [64, 112, 1],
    "num_workers": 0,
    "cache_rate": 1.0,
}
PRETRAINING = {"cpa_weight": 0.1, "lr_schedule": "one_cycle", "body_lr": 1e-3, "prompt_lr": 5e-3}
HIPPOCAMPUS_PRETRAINING = {
    **PRETRAINING,
    "teacher_size": [48, 64, 1],
    "student_sizes": [[48, 64, 1], [32, 48, 1]],
    "batch_size": 2,
    "epochs": 12,
    "epoch_length": 150,
    "val_interval": 2,
}
CT_PRETRAINING = {
    **PRETRAINING,
    "teacher_size": [64, 112, 1],
    "student_sizes": [[64, 112, 1], [48, 80, 1]],
    "batch_size": 1,
    "samples_per_volume": 4,
    "epochs": 8,
    "epoch_length": 75,
    "val_interval": 99,
}
SHORT = {"epochs": 4, "epoch_length": 25}
TAUGHT_HIPPOCAMPUS = {**PUNET_HIPPOCAMPUS, "new_class": "posterior hippocampus", "batch_size": 2, **SHORT}
TAUGHT_CT = {**PUNET_CT, "new_class": "kidney", "batch_size": 1, "samples_per_volume": 4, **SHORT}

STUDIES: dict[str, Study] = {
    "punet_hippocampus": Study(
        "punet_ct_segmentation",
        "mr_hippocampus",
        PUNET,
        TAUGHT_HIPPOCAMPUS,
        (3, 10, None),
        weights=False,
        pretraining=HIPPOCAMPUS_PRETRAINING,
    ),
    "punet_hippocampus_long": Study(
        "punet_ct_segmentation",
        "mr_hippocampus",
        {name: PUNET[name] for name in ("prompt", "full")},
        {**TAUGHT_HIPPOCAMPUS, "epoch_length": 100},
        (10,),
        weights=False,
        pretraining=HIPPOCAMPUS_PRETRAINING,
    ),
    "punet_ct": Study(  # ct_halves: made by prepare_ct_organs.py
        "punet_ct_segmentation", "ct_halves", PUNET, TAUGHT_CT, (None,), weights=False, pretraining=CT_PRETRAINING
    ),
    "inflation_hippocampus": Study(
        "inflated_vit_segmentation",
        "mr_hippocampus",
        INFLATION,
        {**INFLATED, **HIPPOCAMPUS, **window([0.375, 0.375, 2.0], [112, 154, 5])},
        (3,),
        attribution=HIPPOCAMPUS_SOURCE,
        pictures=3,
    ),
    "inflation_brain": Study(
        "inflated_vit_segmentation",
        "mr_brain_slab",
        INFLATION,
        {**INFLATED, **BRAIN, **window([1.0, 1.0, 2.0], [182, 224, 5])},
        (3,),
    ),
    "hippocampus_rates": Study(
        "inflated_vit_segmentation",
        "mr_hippocampus",
        RATES,
        {**INFLATED, **HIPPOCAMPUS, **window([0.375, 0.375, 2.0], [112, 154, 5])},
        (3,),
        seeds=1,
        section="validation",
    ),
    "hippocampus": Study(
        "inflated_vit_segmentation",
        "mr_hippocampus",
        METHODS,
        {**INFLATED, **HIPPOCAMPUS, **window([0.375, 0.375, 2.0], [112, 154, 5])},
        report=True,
        title="Which method for two parts of the hippocampus?",
        attribution=HIPPOCAMPUS_SOURCE,
        pictures=3,
    ),
    "brain": Study(
        "inflated_vit_segmentation",
        "mr_brain_slab",
        METHODS,
        {**INFLATED, **BRAIN, **window([1.5, 1.5, 2.0], [126, 154, 5]), "batch_size": 1},
    ),
    "slices_rates": Study(
        "aim_vit_segmentation",
        "mr_hippocampus",
        AIM_RATES,
        {**SLICED, **HIPPOCAMPUS, **window([0.5, 0.5, 2.0], [84, 112, 5])},
        seeds=1,
        section="validation",
    ),
    "hippocampus_slices": Study(
        "aim_vit_segmentation",
        "mr_hippocampus",
        AIM,
        {**SLICED, **HIPPOCAMPUS, **window([0.5, 0.5, 2.0], [84, 112, 5])},
    ),
    "brain_slices": Study(
        "aim_vit_segmentation",
        "mr_brain_slab",
        AIM,
        {**SLICED, **BRAIN, **window([2.0, 2.0, 2.0], [98, 112, 5])},
    ),
    "brain_san": Study(
        "inflated_vit_segmentation",
        "mr_brain_slab",
        SAN,
        {**INFLATED, **BRAIN, **window([1.5, 1.5, 2.0], [126, 154, 5]), "batch_size": 1, "overlap": 0.25},
        (3,),
    ),
    "busi_rates": Study(
        "ept_vit_classification", "cls_busi", FEW_RATES, FEW_PICTURES, (10,), seeds=1, section="validation"
    ),
    "large_rates": Study(
        "fpt_vit_classification", "cls_busi", LARGE_RATES, LARGE, (None,), seeds=1, section="validation"
    ),
    "busi": Study(
        "ept_vit_classification",
        "cls_busi",
        FEW_METHODS,
        FEW_PICTURES,
        (1, 5, 10),
        seeds=5,
        report=True,
        title="Which method for breast ultrasound?",
        attribution=BUSI_SOURCE,
        pictures=6,
    ),
    "busi_large": Study("fpt_vit_classification", "cls_busi", LARGE_METHODS, LARGE, (None,)),
    "cxr_large": Study(
        "fpt_vit_classification", "cls_cxr_view", RADIOGRAPHS, {**LARGE, "class_names": ["ap", "pa"]}, (None,)
    ),
}
