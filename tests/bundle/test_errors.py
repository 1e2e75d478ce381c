"""A run that an error stops ends with one sentence, whole, as its last line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from torch.utils.data import DataLoader, Dataset

from monai_petl.bundle.errors import is_refusal, root_cause, sentence_of
from monai_petl.data import DataError, load_datalist, make_phantom_dataset

BUNDLES = Path(__file__).parents[2] / "bundles"


class Broken(Dataset):
    """A data set whose items cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> None:
        try:
            raise self.error
        except Exception as error:
            raise RuntimeError("applying transform <LoadImaged>") from error


def raised_by(error: Exception, workers: int) -> Exception:
    with pytest.raises(Exception, match=r".") as found:
        list(DataLoader(Broken(error), num_workers=workers))
    return found.value


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        (DataError("c0.nii.gz holds NaN; repair it"), 1),
        (DataError("c0.nii.gz holds NaN; repair it"), 0),
        (ValueError("a: b"), 0),
        (OSError("no file x"), 0),
        (KeyError("liver"), 0),
    ],
)
def test_what_a_transform_refuses_is_the_sentence_with_and_without_data_workers(error: Exception, workers: int) -> None:
    found = raised_by(error, workers)
    assert sentence_of(found) == str(error.args[0])
    assert is_refusal(found)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_a_program_is_no_refusal(workers: int) -> None:
    found = raised_by(ZeroDivisionError("division by zero"), workers)
    assert sentence_of(found) == "division by zero"
    assert not is_refusal(found)


def test_a_fault_in_a_config_is_told_with_its_component() -> None:
    config = ConfigParser(
        {"lr": "abc", "made": {"_target_": "torch.nn.Linear", "in_features": "@lr", "out_features": 2}}
    )
    with pytest.raises(RuntimeError) as error:
        config.get_parsed_content("made")
    assert not is_refusal(error.value)
    assert sentence_of(error.value).endswith("(in Linear(in_features, out_features): check the values that it gets)")
    config = ConfigParser({"window": [1], "high": "$@window[1]"})
    with pytest.raises(RuntimeError) as error:
        config.get_parsed_content("high")
    assert sentence_of(error.value) == "list index out of range (in $@window[1]: check the values that it gets)"
    assert isinstance(root_cause(error.value), IndexError)


def run_bundle(root: Path, *words: object) -> subprocess.CompletedProcess[str]:
    files = [str(root / "configs" / name) for name in ("train.json", "small.json")]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files), "--bundle_root", str(root)]
    command += ["--method", "scratch", "--device", "cpu", "--epochs", "1", "--epoch_length", "1", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=300)


@pytest.mark.slow
def test_the_last_line_of_a_bundle_run_is_ours_and_whole(tmp_path: Path) -> None:
    root = tmp_path / "lora_swin_unetr_segmentation"
    shutil.copytree(BUNDLES / root.name, root)
    data = make_phantom_dataset(tmp_path / "data", 2, 1, 0, 0, (16, 16, 4))
    image = Path(load_datalist(data)[0]["image"])
    voxels = np.asarray(nib.load(image).dataobj).astype(np.float32)
    voxels[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(voxels, nib.load(image).affine), image)
    names = ("--class_names", "['liver']")
    for words, sentence in (
        (
            ("--dataset_dir", "/nowhere", *names),
            "DataError: dataset_dir names no folder: /nowhere. Give the data set's",
        ),
        (
            ("--dataset_dir", data, *names, "--epoch", 3),
            "ValueError: the config has no id 'epoch', which --epoch would set",
        ),
        (("--dataset_dir", data, *names, "--num_workers", 2), f"ValueError: {image} holds NaN or infinite values"),
    ):
        done = run_bundle(root, *words)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1, done.stderr
        assert lines[-1].startswith(sentence)
        assert "Traceback" not in done.stderr
        assert not (root / "models" / "model.pt").exists()
