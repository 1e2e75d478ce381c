"""Every command of every model card runs, in order, on toy data and with the sizes of small.json."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import fire
import pytest
import torch
from monai.bundle import ckpt_export
from monai.bundle.scripts import run
from safetensors.torch import save_file

from monai_petl.__main__ import main
from monai_petl.bundle import BundleFolder
from monai_petl.bundle.toy_data import make_toy_pictures, make_toy_volumes
from tests.bundle.test_new_class import shrink
from tests.bundles.helpers import BUNDLES, PUNET, SIZE, Bundle, checkpoint_state, named, swin_state

MONAI = {"run": run, "ckpt_export": ckpt_export}
ORGANS = ["liver", "spleen", "aorta", "kidney", "spine", "pancreas"]  # of PUNet's card


def commands(card: str) -> Iterator[list[str]]:
    """The commands in a card's blocks, word by word."""
    language = None
    for line in card.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language == "" and line.startswith(("python -m monai", "torchrun ")):
            yield shlex.split(line)


def prepare(bundle: Bundle, words: list[str]) -> None:
    """Toy data of the classes that a command names, or of the bundle's own, where the command reads it."""
    options = dict(pairwise(words))
    classes = BundleFolder(Path.cwd()).class_names
    if bundle == PUNET:
        classes = ORGANS
    elif "--class_names" in options:
        classes = re.findall(r"\w+", options["--class_names"])
    folder = Path(options.get("--dataset_dir", "data"))
    shutil.rmtree(folder, ignore_errors=True)
    if "classification" in bundle.name:
        make_toy_pictures(folder, classes, training=12)
        shutil.rmtree("new", ignore_errors=True)
        shutil.copytree(folder / "test" / classes[0], "new")
        if "--multi_label" in options:
            table_of(folder, classes)
    else:
        make_toy_volumes(folder, classes, SIZE, bundle.settings["train"]["spacing"])
        shutil.rmtree("scans", ignore_errors=True)
        shutil.copytree(folder / "imagesTs", "scans")


def table_of(folder: Path, classes: list[str]) -> None:
    """The same pictures as a list with a column a class, as several findings an image need it."""
    rows = [["file", *classes, "split"]]
    for path in sorted(folder.rglob("*.png")):
        own = path.parent.name
        rows.append([path.relative_to(folder).as_posix(), *(str(int(own == name)) for name in classes), path.parts[-3]])
    (folder / "labels.csv").write_text("\n".join(",".join(row) for row in rows) + "\n", encoding="utf-8")


def fitting(words: list[str], shape: tuple[int, ...]) -> list[str]:
    """A command with the sizes of the small network, and the checkpoint that there is."""
    found = list(words)
    for i, word in enumerate(words):
        if words[i - 1] == "--input_shape":
            found[i] = str(list(shape))
        elif words[i - 1] == "--resume_path":
            found[i] = str(max(Path("eval/checkpoints").glob("training_*.pt"), key=os.path.getmtime))
        elif "_size" in words[i - 1]:  # of windows for patches of 16, where these have 8
            found[i] = re.sub(r"\b(224|256)\b", "32", word).replace("16,16", "8,8")
    return found


def learn_elsewhere() -> None:
    """The adapter that a card has from somebody else, who has taught the same network the pancreas."""
    bundle = BundleFolder(Path.cwd())
    classes = {"base_classes": ["liver", "spleen", "aorta", "kidney", "spine"], "new_class": "pancreas"}
    bundle.run("train", "data", ckpt_dir="elsewhere", pretrained_path="models/model.pt", **classes)
    Path("from_a_colleague").mkdir()
    shutil.copy("elsewhere/adapters/pancreas.safetensors", "from_a_colleague")


def carry_out(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command as the shell would run it; in this process, unless it starts several."""
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(words, env=environment, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    elif words[2] == "monai_petl":
        monkeypatch.setattr(sys, "argv", words[2:])
        main()
    else:
        path = list(sys.path)
        fire.Fire(MONAI, command=words[3:])
        sys.path[:] = path


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES, ids=named)
def test_every_command_of_the_card_runs(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shrink(bundle, tmp_path))
    shape = BundleFolder(Path.cwd()).input_shape
    Path("models/pretrained").mkdir(parents=True)
    save_file(checkpoint_state(), "models/pretrained.safetensors")
    torch.save(swin_state(), "models/pretrained/model.pt")
    found = list(commands(BundleFolder(Path.cwd()).card()))
    assert len(found) > 8
    for words in found:
        prepare(bundle, words)
        if "--resume_path" in words:  # of the first training: others have written their checkpoints to the same folder
            carry_out(next(words for words in found if "configs/train.json" in words), monkeypatch)
        if any("from_a_colleague" in word for word in words):
            learn_elsewhere()
        carry_out(fitting(words, shape), monkeypatch)
    assert {"run", "ckpt_export"} <= {word for words in found for word in words}
