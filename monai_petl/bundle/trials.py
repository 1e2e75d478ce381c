"""What a bundle has to do: its network, and its configs on toy data. With the ids of small.json, on the CPU, in seconds."""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigWorkflow, create_workflow, load, verify_net_in_out
from torch import Tensor, nn

from monai_petl.bundle.checks import CheckError, SkippedError
from monai_petl.bundle.folder import BundleFolder
from monai_petl.bundle.pack import pack
from monai_petl.bundle.toy_data import make_toy_pictures, make_toy_volumes
from monai_petl.weights.state_files import read_state_dict

__all__ = ["TRIALS", "Trial"]

WITHOUT_PACKAGE = """
import sys, traceback
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "monai_petl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from monai.bundle import ckpt_export, load, run, verify_net_in_out
root, name = sys.argv[1:]
config, meta = f"{root}/configs/inference.json", f"{root}/configs/metadata.json"
for label, entry in {
    "run": lambda: run(config_file=config),
    "train": lambda: run(config_file=f"{root}/configs/train.json"),
    "verify_net_in_out": lambda: verify_net_in_out("network_def", config_file=config, meta_file=meta),
    "ckpt_export": lambda: ckpt_export("network_def", "model.ts", f"{root}/models/model.pt", meta, config),
    "load": lambda: load(name, bundle_dir=f"{root}/.."),
}.items():
    try:
        entry()
        said = "no error"
    except Exception:
        said = traceback.format_exc()
    print("" if "pip install monai-petl" in said else f"{label}: {said.splitlines()[-1]}", end="\\n")
"""


class Trial:
    """A scratch copy of a bundle with small sizes, in a folder with spaces in its path, and toy data for it.

    Args:
        bundle: is not changed.
        scratch: an empty folder.
    """

    def __init__(self, bundle: BundleFolder, scratch: Path) -> None:
        self.source, self.scratch, self._failed = bundle, scratch, False
        self.bundle = self.copy("a bundle")

    def copy(self, folder: str) -> BundleFolder:
        """The bundle as it is published, with the ids of small.json written into its configs."""
        copy = self.source.small_copy(self.scratch / folder / self.source.name, device="cpu")
        for name in copy.configs:
            if name.startswith("multi_gpu"):  # which has a device for each process
                copy.write(name, {**copy.config(name), "device": self.source.config(name)["device"]})
        return copy

    @cached_property
    def data(self) -> Path:
        """A toy data set of the bundle's classes."""
        classes, folder = self.source.class_names, self.scratch / "toy data"
        if self.source.task == "classification":
            return make_toy_pictures(folder, classes)
        return make_toy_volumes(folder, classes, spacing=self.source.sizes("train").get("spacing", (8, 8, 10)))

    @cached_property
    def start(self) -> dict[str, Any]:
        """What trainings start from: the network of the bundle's own pre-training, else random weights."""
        if "pretrain" not in self.bundle.configs:
            return {"pretrained_path": None}
        models = self.scratch / "pretrained"
        self.bundle.run("pretrain", self.data, ckpt_dir=str(models))
        return {"pretrained_path": str(models / "model.pt")}

    @property
    def training(self) -> tuple[ConfigWorkflow, dict[str, Tensor]]:
        """A finished training, and the tensors of its network before it; made once, also when it fails."""
        if self._failed:
            raise SkippedError("the training failed")
        self._failed = True
        found = self._training
        self._failed = False
        return found

    @cached_property
    def _training(self) -> tuple[ConfigWorkflow, dict[str, Tensor]]:
        flow = self.bundle.workflow("train", self.data, **self.start)
        flow.initialize()
        network = flow.parser.get_parsed_content("adapted_network")
        before = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        flow.run()
        flow.finalize()
        return flow, before

    @property
    def network(self) -> nn.Module:
        """The network of inference.json with random weights that are always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.bundle.parser("inference").get_parsed_content("network_def").eval()

    def files(self) -> dict[str, str]:
        """Arguments of MONAI's commands that read a config."""
        configs = self.source.root / "configs"
        return {"config_file": str(configs / "inference.json"), "meta_file": str(configs / "metadata.json")}


def metric_of(flow: ConfigWorkflow) -> float:
    """The key metric of a workflow's evaluator, the best so far."""
    return float(flow.parser.get_parsed_content("validate::evaluator").state.best_metric)


def try_network(trial: Trial) -> None:
    """The network at its full size takes and gives what the metadata says."""
    verify_net_in_out("network_def", bundle_root=str(trial.source.root), **trial.files())
    if trial.source.model.is_file():
        whole = trial.source.parser("inference", small=False).get_parsed_content("network_def").state_dict()
        held = read_state_dict(trial.source.model, "")
        if [(n, t.shape) for n, t in held.items()] != [(n, t.shape) for n, t in whole.items()]:
            raise CheckError("models/model.pt has other tensors than network_def, as inference.json is written")
    with torch.no_grad():
        out = trial.network(torch.rand(trial.bundle.input_shape))
    channels = len(trial.source.metadata["network_data_format"]["outputs"]["pred"]["channel_def"])
    size = trial.bundle.input_shape[2:] if trial.source.task == "segmentation" else ()
    if tuple(out.shape[:2]) != (1, channels) or (size and out.shape[2:] not in (size, (*size[:2], 1))):
        raise CheckError(f"an input {trial.bundle.input_shape} gives {tuple(out.shape)}, not {(1, channels, *size)}")


def try_training(trial: Trial) -> None:
    """Training ends with a finite loss, changes nothing frozen, and writes the complete network, flat, and an adapter."""
    flow, before = trial.training
    network = flow.parser.get_parsed_content("adapted_network")
    state = read_state_dict(trial.bundle.model, "")
    if list(state) != list(flow.parser.get_parsed_content("network_def").state_dict()):
        raise CheckError("models/model.pt has other tensors than network_def")
    learnt = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    now = network.state_dict()
    moved = [name for name in before if name not in learnt and not torch.equal(before[name], now[name])]
    if moved:
        raise CheckError(f"training changed {len(moved)} frozen tensors, such as {moved[0]}")
    if all(torch.equal(before[name], now[name]) for name in learnt):
        raise CheckError("training changed nothing")
    broken = [name for name in sorted(learnt) if not now[name].isfinite().all()]
    output = flow.parser.get_parsed_content("train::trainer").state.output
    losses = [float(item["loss"]) for item in (output if isinstance(output, list) else [output])]
    if broken or not all(map(math.isfinite, losses)):
        raise CheckError(f"the last loss is {losses[0]}, and {len(broken)} trained tensors are not finite")
    if not list((trial.bundle.root / "models" / "adapters").glob("*.safetensors")):
        raise CheckError("no adapter was written to models/adapters")


def try_evaluation(trial: Trial) -> None:
    """Evaluation of the written network gives what validation found, and a table of metrics."""
    found = metric_of(trial.training[0])
    flow = trial.bundle.run("evaluate", trial.data, **trial.start)
    again, kept = metric_of(flow), read_state_dict(trial.bundle.model, "")
    network = flow.parser.get_parsed_content("adapted_network").state_dict()
    if any(name not in kept or not torch.equal(tensor, kept[name]) for name, tensor in network.items()):
        raise CheckError("evaluation has other weights than models/model.pt")
    if not abs(found - again) <= 1e-4:
        raise CheckError(f"validation found {found:.4f}, evaluation {again:.4f}")
    if not list((trial.bundle.root / "eval").glob("*.csv")):
        raise CheckError("evaluation wrote no table of metrics into output_dir")


def try_inference(trial: Trial) -> None:
    """Inference gives each case its segmentation on the image's grid, or its row of probabilities."""
    trial.training  # noqa: B018 (made once, when it is first asked for)
    _infer(trial.bundle, trial.data)


def _infer(bundle: BundleFolder, data: Path) -> None:
    shutil.rmtree(bundle.root / "eval", ignore_errors=True)
    bundle.run("inference", data)
    if bundle.task == "classification":
        (table,) = (bundle.root / "eval").glob("*.csv")
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if len(rows) != len(list((data / "test").rglob("*.png"))):
            raise CheckError(f"the table has {len(rows)} rows for the images of the test section")
        return
    written = sorted((bundle.root / "eval").glob("*.nii.gz"))
    images = sorted((data / "imagesTs").glob("*.nii.gz"))
    for image, path in zip(images, written, strict=True):
        source, found = nib.load(image), nib.load(path)
        if source.shape != found.shape or not np.allclose(source.affine, found.affine, atol=1e-4):
            raise CheckError(f"{path.name} does not lie on the grid of {image.name}")


def try_processes(trial: Trial) -> None:
    """Two processes train one model (gloo, on the CPU)."""
    bundle = trial.copy("two processes")
    files = [str(bundle.root / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train")]
    options = {"config_file": files, "bundle_root": bundle.root, "dataset_dir": trial.data, "epochs": 1, **trial.start}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    values = {key: "$None" if value is None else str(value) for key, value in options.items()}  # MONAI drops a None
    done = _python([*words, *(text for key, value in values.items() for text in (f"--{key}", value))], trial)
    if done.returncode or not bundle.model.is_file():
        raise CheckError(f"torchrun ended with {done.returncode}: {_last_line(done.stderr)}")


def try_properties(trial: Trial) -> None:
    """MONAI finds all properties of training and inference, and ``load`` builds the network without data."""
    flow, _ = trial.training
    for name, kind in (("train", "train"), ("inference", "infer")):
        ids = {"bundle_root": str(trial.bundle.root), "dataset_dir": str(trial.data), **trial.start}
        ids = {key: "$None" if value is None else value for key, value in ids.items()}  # MONAI drops a None
        workflow = create_workflow(config_file=trial.bundle.files_of(name), workflow_type=kind, **ids)
        wrong = workflow.check_properties()
        if wrong:
            raise CheckError(f"{name}.json: MONAI does not find {', '.join(wrong)}")
    root = trial.bundle.root
    network = load(trial.bundle.name, bundle_dir=str(root.parent), workflow_type="train", device="cpu")
    if type(network) is not type(flow.parser.get_parsed_content("network_def")):
        raise CheckError(f"monai.bundle.load gives a {type(network).__name__}")


def try_missing(trial: Trial) -> None:
    """What is missing is named: the network's file in inference, the data's folder in training."""
    bundle = trial.copy("nothing")
    _must_name("inference without a network", "model.pt", lambda: bundle.run("inference", trial.data))
    empty = trial.scratch / "empty folder"
    empty.mkdir()
    _must_name("training without data", str(empty), lambda: bundle.run("train", empty, **trial.start))


def try_without_package(trial: Trial) -> None:
    """Where monai_petl is not installed, every way into the bundle says what to install."""
    trial.training  # noqa: B018
    done = _python(["-c", WITHOUT_PACKAGE, str(trial.bundle.root), trial.bundle.name], trial)
    said = [line for line in done.stdout.splitlines() if line.split(":")[0] in WITHOUT_PACKAGE and ": " in line]
    if done.returncode or said:
        raise CheckError(f"without monai_petl, {'; '.join(said) or _last_line(done.stderr)}")


def try_archive(trial: Trial) -> None:
    """The packed bundle unpacks to one folder that runs."""
    trial.training  # noqa: B018
    packed = pack(trial.bundle.root, trial.scratch / "zoo", "https://example.org", check=False)
    with zipfile.ZipFile(packed.path) as archive:
        archive.extractall(trial.scratch / "unpacked")
    (root,) = (trial.scratch / "unpacked").iterdir()
    for entry in packed.large:  # what downloading does
        (root / entry["path"]).parent.mkdir(exist_ok=True)
        shutil.copy(trial.bundle.root / entry["path"], root / entry["path"])
    _infer(BundleFolder(root), trial.data)


TRIALS = {
    "network": try_network,
    "train": try_training,
    "evaluate": try_evaluation,
    "infer": try_inference,
    "properties": try_properties,
    "2 processes": try_processes,
    "what is missing": try_missing,
    "without monai_petl": try_without_package,
    "archive": try_archive,
}


def _must_name(what: str, name: str, act: Callable[[], Any]) -> None:
    try:
        act()
    except Exception as error:
        told, cause = [], error
        while cause is not None:
            told.append(str(cause))
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        if not any(name in text for text in told):
            raise CheckError(f"{what} does not name {name}: {told[-1]}") from error
        return
    raise CheckError(f"{what} ends without an error")


def _python(words: list[str], trial: Trial) -> subprocess.CompletedProcess:
    """A process of this Python in another folder, on the CPU with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *words], cwd=trial.scratch, env=environment, capture_output=True, encoding="utf-8", check=False
    )


def _last_line(text: str) -> str:
    """The line of a process's output that says most: its last error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["nothing was said"]
    telling = [line for line in lines if re.search(r"\w(Error|Exception): |exitcode|Signal \d|terminate called", line)]
    return (telling or lines)[-1]
