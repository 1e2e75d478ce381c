from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged

from monai_petl.transforms import RequireContentd


def test_good_image_passes_as_it_is() -> None:
    data = {"image": MetaTensor(torch.arange(8.0).view(1, 2, 2, 2)), "label": torch.zeros(1, 2, 2, 2)}
    result = RequireContentd("image")(data)
    assert result["image"] is data["image"]
    assert result["label"] is data["label"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_image_that_is_not_finite_is_refused_by_the_name_of_its_file(value: float, tmp_path: Path) -> None:
    voxels = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    voxels[0, 0, 0] = value
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "scan.nii.gz")
    data = LoadImaged("image")({"image": str(tmp_path / "scan.nii.gz")})
    with pytest.raises(ValueError, match=r"scan\.nii\.gz holds NaN or infinite values"):
        RequireContentd("image")(data)


def test_constant_image_is_refused_with_its_value() -> None:
    with pytest.raises(ValueError, match=r"image is constant \(every voxel is 7\); leave it out"):
        RequireContentd("image")({"image": torch.full((1, 2, 2, 2), 7, dtype=torch.int16)})


def test_missing_key_is_an_error_unless_allowed() -> None:
    with pytest.raises(KeyError):
        RequireContentd("image")({})
    assert RequireContentd("image", allow_missing_keys=True)({}) == {}
