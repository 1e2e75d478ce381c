"""What the bundle tests share: where the bundle is, settings that make it small, and a way to run it in this process."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from monai.bundle import ConfigWorkflow
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
NAME = "punet_ct_segmentation"
BUNDLE = REPOSITORY / "bundles" / NAME
SIZE, SPACING = (32, 32, 6), (8.0, 8.0, 10.0)  # of the phantoms: voxels, and mm
BASE_CLASSES = ["liver", "spleen"]

NETWORK = {"channels": [8, 8, 16, 16, 24], "tokens_per_class": 4}
INFERENCE = {**NETWORK, "spacing": list(SPACING), "patch_size": [32, 32, 1], "num_workers": 0}
TRAINING = {
    **INFERENCE,
    "base_classes": BASE_CLASSES,
    "slab_size": [32, 32, 1],
    "batch_size": 2,
    "epochs": 2,
    "epoch_length": 2,
    "val_interval": 1,
    "cache_rate": 1.0,
}
PRETRAINING = {**TRAINING, "teacher_size": [32, 32, 1], "student_sizes": [[32, 32, 1], [32, 32, 1]]}
SETTINGS = {"pretrain": PRETRAINING, "train": TRAINING, "evaluate": TRAINING, "inference": INFERENCE}


@dataclass(frozen=True)
class Trained:
    """A copy of the bundle after a training, and the workflow that did it."""

    bundle: Path
    workflow: ConfigWorkflow

    @property
    def model(self) -> Path:
        return self.bundle / "models" / "model.pt"


def copy_bundle(folder: Path) -> Path:
    """The bundle as it is published: without the folders that running it makes."""
    return Path(shutil.copytree(BUNDLE, folder / NAME, ignore=shutil.ignore_patterns("models", "eval", "data")))


def config_files(bundle: Path, name: str) -> list[str]:
    """The files behind ``evaluate`` (which overrides ``train``) and the other configs."""
    files = ["train", "evaluate"] if name == "evaluate" else [name]
    return [str(bundle / "configs" / f"{file}.json") for file in files]


def workflow(name: str, root: Path, data: Path, **overrides: Any) -> ConfigWorkflow:
    """A config of the bundle with small sizes, not initialised. It writes below ``root``; the configs may lie elsewhere."""
    settings = {**SETTINGS[name], "bundle_root": str(root), "dataset_dir": str(data), **overrides}
    bundle = root if (root / "configs").is_dir() else BUNDLE
    kind = "infer" if name == "inference" else "train"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MONAI's, that configs are code
        return ConfigWorkflow(config_files(bundle, name), logging_file=False, workflow_type=kind, **settings)


def run(name: str, root: Path, data: Path, **overrides: Any) -> ConfigWorkflow:
    """Run a config of the bundle as ``python -m monai.bundle run`` does."""
    flow = workflow(name, root, data, **overrides)
    path = list(sys.path)
    try:
        flow.initialize()
        flow.run()
        flow.finalize()
    finally:
        sys.path[:] = path
    return flow


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


def command(*arguments: str, **overrides: Any) -> Sequence[str]:
    """A command line of this Python with ``--id value`` for each override."""
    options = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
    return [sys.executable, *arguments, *options]
