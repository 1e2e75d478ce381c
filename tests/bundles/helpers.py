"""What the bundle tests share: where the bundle is, settings that make it small, and a way to run it in this process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
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

from monai_petl.bundle import BundleFolder
from tests.weights.inflation.sources import timm_vit

REPOSITORY = Path(__file__).parents[2]
SIZE, SPACING = (32, 32, 6), (8.0, 8.0, 10.0)  # of the phantoms: voxels, and mm


BASE_CLASSES = ["liver", "spleen"]  # of PUNet: the kidney is taught


@dataclass(frozen=True)
class Bundle:
    """A bundle of the repository, with the settings of its small.json for each of its configs."""

    name: str

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Config -> overrides that make it small; the keys are the configs that can be run."""
        folder, found = BundleFolder(self.path), {}
        for config in folder.configs:
            if config in ("pretrain", "train", "evaluate", "inference"):
                found[config] = folder.sizes(config)
                if self.name == "punet_ct_segmentation" and config != "inference":
                    found[config] = {**found[config], "base_classes": BASE_CLASSES}
        return found

    @property
    def classes(self) -> list[str]:
        """What these settings segment or classify, in order of the channels."""
        train = self.settings["train"]
        if "base_classes" in train:
            return [*train["base_classes"], self.config("train")["new_class"]]
        return self.config("inference")["class_names"]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the network, with these settings."""
        return BundleFolder(self.path).input_shape

    @property
    def source(self) -> str:
        """Fixture with the file that its trainings start from."""
        start = self.config("train")["pretrained_path"]
        return (
            "pretrained_punet"
            if start == "@ckpt_path"
            else "checkpoint"
            if "safetensors" in start
            else "swin_checkpoint"
        )

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


BUNDLES = tuple(Bundle(path.name) for path in sorted((REPOSITORY / "bundles").iterdir()))
SEGMENTERS = tuple(bundle for bundle in BUNDLES if "segmentation" in bundle.name)
CLASSIFIERS = tuple(bundle for bundle in BUNDLES if "classification" in bundle.name)
PUNET, INFLATED, AIM = (Bundle(f"{name}_segmentation") for name in ("punet_ct", "inflated_vit", "aim_vit"))
LORA, VPETL = Bundle("lora_swin_unetr_segmentation"), Bundle("vpetl_swin_unetr_segmentation")
CLASSIFIER, EMBEDDED_PROMPTS, FINE_GRAINED = (Bundle(f"{name}_vit_classification") for name in ("lora", "ept", "fpt"))
SIDE_ADAPTER = Bundle("san_vit_segmentation")
BUNDLE, copy_bundle, config_files, workflow, run = PUNET.path, PUNET.copy, PUNET.config_files, PUNET.workflow, PUNET.run
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
        small = LORA.settings["train"]
        sizes = {name: small[name] for name in ("depths", "num_heads", "feature_size")}
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


def train_in_two_processes(bundle: Bundle, root: Path, data: Path, **overrides: Any) -> None:
    """One epoch of a copy of the bundle, on the CPU."""
    files = [str(root / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train")]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run")
    settings = {**bundle.settings["train"], "epochs": 1, **overrides}
    done = subprocess.run(
        command(*torchrun, **settings, config_file=files, bundle_root=root, dataset_dir=data),
        cwd=root.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def command(*arguments: str, **overrides: Any) -> Sequence[str]:
    """A command line of this Python with ``--id value`` for each override."""
    options = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
    return [sys.executable, *arguments, *options]
