"""Inference of every segmentation bundle on volumes as they come: each format, names in capitals, single slices, shear."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_petl.data import load_datalist
from monai_petl.data.volumes import read_array, read_grid
from tests.bundles.helpers import PUNET, SEGMENTERS, Bundle
from tests.volumes import save

OBLIQUE = nib.affines.from_matvec(
    np.array([[0.0, -1, 0], [0.9848, 0, 0.1736], [-0.1736, 0, 0.9848]]) @ np.diag([8.0, 8.0, 10.0]), [12, -34, 56]
)
SHEARED = nib.affines.from_matvec(np.array([[8.0, 1.5, 0], [0, 8, 0], [0, 0, 10]]), [5, 6, 7])
STACKED = np.diag([-8.0, -8.0, 10.0, 1.0])


@pytest.mark.parametrize("each", SEGMENTERS, ids=lambda bundle: bundle.name, indirect=True)
def test_the_mask_has_the_shape_and_the_place_of_its_image(
    each: Bundle, tmp_path: Path, data: Path, weights: dict[str, str]
) -> None:
    image = read_array(load_datalist(data, "test")[0]["image"]).astype(np.int16)
    inputs = {
        "a.nii": (image, OBLIQUE),
        "b.NII.GZ": (image, OBLIQUE),
        "c.nrrd": (image, OBLIQUE),
        "d.mha": (image, STACKED),
        "1.2.840.dcm": (image, STACKED),  # written as the folder 1.2.840
        "sheared.nii.gz": (image, SHEARED),
        "slice.nii.gz": (image[:, :, 2:3], STACKED),
        "row.nrrd": (image[16:17], OBLIQUE),
        "column.nii.gz": (image[:, 16:17], OBLIQUE),
    }
    for name, (voxels, affine) in inputs.items():
        save(tmp_path / "new" / name, voxels, affine)
    names = {"class_names": ["kidney"]} if each == PUNET else {}
    each.run("inference", tmp_path / "run", data, images=str(tmp_path / "new" / "*"), **weights, **names)
    out = tmp_path / "run" / "eval"
    assert len(list(out.iterdir())) == len(inputs)
    for name, (voxels, affine) in inputs.items():
        stem = name.lower().removesuffix(".dcm").split(".n")[0].removesuffix(".mha")
        shape, found = read_grid(out / f"{stem}_seg.nii.gz")
        assert shape == voxels.shape, name
        assert np.allclose(found, affine, atol=1e-3), name
    same = [read_array(out / f"{stem}_seg.nii.gz") for stem in ("a", "b", "c")]
    assert np.array_equal(same[0], same[1])
    assert np.mean(same[0] == same[2]) > 0.999  # the affine of NRRD is rounded elsewhere
