"""What the bundle tests share: where the bundle is, settings that make it small, and a way to run it in this process."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.nets import SwinUNETR
from torch import Tensor

from tests.inflation.sources import timm_vit

REPOSITORY = Path(__file__).parents[2]
SIZE, SPACING = (32, 32, 6), (8.0, 8.0, 10.0)  # of the phantoms: voxels, and mm
BASE_CLASSES = ["liver", "spleen"]


@dataclass(frozen=True)
class Bundle:
    """A bundle of the repository, with settings for each of its configs that make it small.

    Attributes:
        name: of its folder.
        settings: config -> overrides; the keys are the configs that can be run.
        shallow: overrides of the network for export, which takes long for each layer.
        input_shape: of the network, with these settings.
        source: fixture with the file that its trainings start from.
    """

    name: str
    settings: dict[str, dict[str, Any]]
    shallow: dict[str, Any]
    input_shape: tuple[int, ...]
    source: str

    @property
    def path(self) -> Path:
        return REPOSITORY / "bundles" / self.name

    def copy(self, folder: Path) -> Path:
        """The bundle as it is published: without the folders that running it makes."""
        return Path(
            shutil.copytree(self.path, folder / self.name, ignore=shutil.ignore_patterns("models", "eval", "data"))
        )

    def config(self, name: str) -> dict[str, Any]:
        """A config as it is written."""
        return json.loads((self.path / "configs" / f"{name}.json").read_text(encoding="utf-8"))

    def config_files(self, bundle: Path, name: str) -> list[str]:
        """The files behind ``evaluate`` (which overrides ``train``) and the other configs."""
        files = ["train", "evaluate"] if name == "evaluate" else [name]
        return [str(bundle / "configs" / f"{file}.json") for file in files]

    def workflow(self, name: str, root: Path, data: Path, **overrides: Any) -> ConfigWorkflow:
        """A config with small sizes, not initialised. It writes below ``root``; the configs may lie elsewhere."""
        settings = {**self.settings[name], "bundle_root": str(root), "dataset_dir": str(data), **overrides}
        bundle = root if (root / "configs").is_dir() else self.path
        kind = "infer" if name == "inference" else "train"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # MONAI's, that configs are code
            return ConfigWorkflow(self.config_files(bundle, name), logging_file=False, workflow_type=kind, **settings)

    def run(self, name: str, root: Path, data: Path, **overrides: Any) -> ConfigWorkflow:
        """Run a config as ``python -m monai.bundle run`` does."""
        flow = self.workflow(name, root, data, **overrides)
        path = list(sys.path)
        try:
            flow.initialize()
            flow.run()
            flow.finalize()
        finally:
            sys.path[:] = path
        return flow


SHORT = {"batch_size": 2, "epochs": 2, "epoch_length": 2, "val_interval": 1, "cache_rate": 1.0}

NETWORK = {"channels": [8, 8, 16, 16, 24], "tokens_per_class": 4}
INFERENCE = {**NETWORK, "spacing": list(SPACING), "patch_size": [32, 32, 1], "num_workers": 0}
TRAINING = {**INFERENCE, **SHORT, "base_classes": BASE_CLASSES, "slab_size": [32, 32, 1]}
PRETRAINING = {**TRAINING, "teacher_size": [32, 32, 1], "student_sizes": [[32, 32, 1], [32, 32, 1]]}
PUNET = Bundle(
    "punet_ct_segmentation",
    {"pretrain": PRETRAINING, "train": TRAINING, "evaluate": TRAINING, "inference": INFERENCE},
    {**NETWORK, "channels": [8, 8, 16]},
    (1, 1, 32, 32, 1),
    "pretrained_punet",
)
BUNDLE, copy_bundle, config_files, workflow, run = PUNET.path, PUNET.copy, PUNET.config_files, PUNET.workflow, PUNET.run

VIT = {"hidden_size": 24, "mlp_dim": 96, "num_layers": 4, "num_heads": 4, "token_size": [8, 8, 3], "feature_size": 4}
VIT_INFERENCE = {**VIT, "spacing": list(SPACING), "patch_size": [32, 32, 3], "num_workers": 0}
VIT_TRAINING = {**VIT_INFERENCE, **SHORT, "slab_size": [32, 32, 3]}
INFLATED = Bundle(
    "inflated_vit_segmentation",
    {"train": VIT_TRAINING, "evaluate": VIT_TRAINING, "inference": VIT_INFERENCE},
    {**VIT, "patch_size": [32, 32, 3], "num_layers": 2},
    (1, 1, 32, 32, 3),
    "checkpoint",
)

SWIN = {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "patch_size": [64, 32, 32]}
SWIN_INFERENCE = {**SWIN, "spacing": list(SPACING), "num_workers": 0}
SWIN_TRAINING = {**SWIN_INFERENCE, **SHORT, "samples_per_volume": 1}
LORA, VPETL = (
    Bundle(
        f"{method}_swin_unetr_segmentation",
        {"train": SWIN_TRAINING, "evaluate": SWIN_TRAINING, "inference": SWIN_INFERENCE},
        SWIN,
        (1, 1, 64, 32, 32),
        "swin_checkpoint",
    )
    for method in ("lora", "vpetl")
)

AIM_INFERENCE = {**VIT_INFERENCE, "token_size": [8, 8], "patch_size": [32, 32, 4]}
AIM_TRAINING = {**AIM_INFERENCE, **SHORT, "slab_size": [32, 32, 4]}
AIM = Bundle(
    "aim_vit_segmentation",
    {"train": AIM_TRAINING, "evaluate": AIM_TRAINING, "inference": AIM_INFERENCE},
    {**VIT, "token_size": [8, 8], "patch_size": [32, 32, 4], "num_layers": 2},
    (1, 1, 32, 32, 4),
    "checkpoint",
)

SAN_SIZES = {key: value for key, value in VIT.items() if key != "feature_size"}
SAN_SIZES |= {"side_size": "tiny", "token_size": [8, 8, 2]}
SAN_INFERENCE = {**SAN_SIZES, "spacing": list(SPACING), "patch_size": [32, 32, 4], "num_workers": 0}
SAN_TRAINING = {**SAN_INFERENCE, **SHORT, "slab_size": [32, 32, 4]}
SIDE_ADAPTER = Bundle(
    "san_vit_segmentation",
    {"train": SAN_TRAINING, "evaluate": SAN_TRAINING, "inference": SAN_INFERENCE},
    {**SAN_SIZES, "patch_size": [32, 32, 4]},
    (1, 1, 32, 32, 4),
    "checkpoint",
)

CLASSES = {**VIT, "token_size": [8, 8], "img_size": [32, 32]}
del CLASSES["feature_size"]
CLASSES_INFERENCE = {**CLASSES, "num_workers": 0, "batch_size": 2}
CLASSES_TRAINING = {**CLASSES_INFERENCE, **SHORT}
CLASSIFIER = Bundle(
    "lora_vit_classification",
    {"train": CLASSES_TRAINING, "evaluate": CLASSES_TRAINING, "inference": CLASSES_INFERENCE},
    {**CLASSES, "num_layers": 2},
    (1, 3, 32, 32),
    "checkpoint",
)

EMBEDDED_PROMPTS = Bundle(
    "ept_vit_classification",
    {"train": CLASSES_TRAINING, "evaluate": CLASSES_TRAINING, "inference": CLASSES_INFERENCE},
    {**CLASSES, "num_layers": 2},
    (1, 3, 32, 32),
    "checkpoint",
)

FINE_SIZES = {**CLASSES, "pretrained_size": [32, 32], "img_size": [64, 64], "side_size": [32, 32], "side_width": 24}
FINE_SIZES |= {"side_heads": 3, "num_prompts": 4}
FINE_INFERENCE = {**FINE_SIZES, "num_workers": 0, "batch_size": 2}
FINE_TRAINING = {**FINE_INFERENCE, **SHORT}
FINE_GRAINED = Bundle(
    "fpt_vit_classification",
    {"train": FINE_TRAINING, "evaluate": FINE_TRAINING, "inference": FINE_INFERENCE},
    {**FINE_SIZES, "num_layers": 2},
    (1, 3, 64, 64),
    "checkpoint",
)

SEGMENTERS = (PUNET, INFLATED, LORA, VPETL, AIM, SIDE_ADAPTER)
CLASSIFIERS = (CLASSIFIER, EMBEDDED_PROMPTS, FINE_GRAINED)
BUNDLES = (*SEGMENTERS, *CLASSIFIERS)
RUNS = [(bundle, config) for bundle in BUNDLES for config in bundle.settings]


def named(value: Any) -> str:
    """A test's parameter in words."""
    return f"{value.parts[-3]}-{value.stem}" if isinstance(value, Path) else getattr(value, "name", str(value))


def checkpoint_state() -> dict[str, Tensor]:
    """A 2D vision transformer of 4 x 4 patches with random weights, always the same, under the names of timm."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm_vit(hidden=24, layers=4, patch=8)


def swin_state(classes: int = 14) -> dict[str, Tensor]:
    """A SwinUNETR with random weights, always the same, with another number of classes than the bundles'."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"depths": SWIN["depths"], "num_heads": SWIN["num_heads"], "feature_size": SWIN["feature_size"]}
        return SwinUNETR(1, classes, **sizes).state_dict()


@dataclass(frozen=True)
class Trained:
    """A copy of the bundle after a training, and the workflow that did it."""

    bundle: Path
    workflow: ConfigWorkflow

    @property
    def model(self) -> Path:
        return self.bundle / "models" / "model.pt"


def parsed(flow: ConfigWorkflow, name: str) -> Any:
    """The object that a workflow made for an id."""
    return flow.parser.get_parsed_content(name)


def state_in(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True, map_location="cpu")


def segmentations(folder: Path) -> dict[str, nib.Nifti1Image]:
    """What inference wrote, by file name."""
    return {path.name: nib.load(path) for path in sorted(folder.glob("*_seg.nii.gz"))}


def files_below(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


def messages(error: BaseException) -> Iterator[str]:
    """What an error says, and the errors that it came from: MONAI wraps all that is raised in a config."""
    seen: BaseException | None = error
    while seen is not None:
        yield str(seen)
        seen = seen.__cause__ or seen.__context__


def refusal(bundle: Bundle, name: str, root: Path, data: Path, pattern: str, **overrides: Any) -> None:
    """Running a config fails with a sentence that fits the pattern, and leaves no file behind."""
    before = files_below(root)
    with pytest.raises(Exception) as error:  # noqa: PT011 (MONAI wraps what is raised; the sentence is what counts)
        bundle.run(name, root, data, **overrides)
    said = list(messages(error.value))
    assert any(re.search(pattern, text) for text in said), said
    assert files_below(root) == before


def command(*arguments: str, **overrides: Any) -> Sequence[str]:
    """A command line of this Python with ``--id value`` for each override."""
    options = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
    return [sys.executable, *arguments, *options]
