from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged, Spacingd

from monai_petl.transforms import GuardedSpacingd


@pytest.fixture
def loaded(tmp_path: Path) -> dict:
    nib.save(nib.Nifti1Image(np.random.rand(6, 5, 4).astype(np.float32), np.diag([2, 2, 4, 1])), tmp_path / "a.nii.gz")
    return LoadImaged("image", ensure_channel_first=True)({"image": str(tmp_path / "a.nii.gz")})


def test_entries_beside_the_image_that_are_no_metadata_stay_as_they_are(loaded: dict) -> None:
    given = {**loaded, "image_path": "/somewhere/a.nii.gz", "image_meta_dict": {"note": 1}, "other": "x"}
    done = GuardedSpacingd("image", pixdim=(1, 1, 1))(given)
    assert done["image_path"] == "/somewhere/a.nii.gz"
    assert done["other"] == "x"
    assert torch.equal(done["image"], Spacingd("image", pixdim=(1, 1, 1))(loaded)["image"])


def test_its_inverse_gives_the_size_of_the_image_back(loaded: dict) -> None:
    spacing = GuardedSpacingd("image", pixdim=(1, 1, 1), mode="nearest")
    done = spacing({**loaded, "image_path": "a"})
    assert done["image"].shape == (1, 11, 9, 13)
    assert torch.equal(spacing.inverse(done)["image"], loaded["image"])


def test_an_image_whose_key_begins_like_anothers_is_resampled_too() -> None:
    data = {name: MetaTensor(torch.rand(1, 8, 8, 8), affine=torch.eye(4)) for name in ("image", "image_2")}
    done = GuardedSpacingd(("image", "image_2"), pixdim=(2, 2, 2))(data)
    assert done["image"].shape == done["image_2"].shape
    assert done["image"].shape != data["image"].shape
