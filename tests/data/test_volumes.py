"""Volumes as files: one grid for all formats, and values that an image or a label can hold."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from monai_petl.data import DataError
from monai_petl.data.volumes import count_values, grid_difference, intensity_range, read_array, read_grid


def test_all_formats_give_the_same_grid_and_voxels(tmp_path):
    voxels = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    affine = np.array([[-2.0, 0, 0, 10], [0, 3.0, 0, -5], [0, 0, 4.0, 7], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "a.nii.gz")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / "a.nrrd"))
    first, second = (read_grid(tmp_path / name) for name in ("a.nii.gz", "a.nrrd"))
    assert first[0] == second[0] == (2, 3, 4)
    assert np.allclose(first[1], affine)
    assert np.allclose(second[1], affine)
    assert grid_difference(first, second) == ""
    assert np.array_equal(read_array(str(tmp_path / "a.nii.gz")), read_array(str(tmp_path / "a.nrrd")))


def test_a_grid_elsewhere_is_described():
    shape, affine = (2, 3, 4), np.eye(4)
    moved = affine.copy()
    moved[0, 3] = 2
    assert "2 mm apart" in grid_difference((shape, affine), (shape, moved))
    assert "shape (2, 3, 5) instead of (2, 3, 4)" in grid_difference((shape, affine), ((2, 3, 5), affine))


def test_values_are_counted_and_senseless_ones_refused():
    assert count_values(np.array([[[0, 2]], [[2, 1]]])) == {0: 1, 1: 1, 2: 2}
    assert intensity_range(np.array([-5.0, 3.0])) == (-5.0, 3.0)
    for wrong, message in ((np.full((2, 2), 7.0), "constant"), (np.array([0.0, np.nan]), "NaN")):
        with pytest.raises(DataError, match=message):
            intensity_range(wrong)
    with pytest.raises(DataError, match="not whole numbers"):
        count_values(np.array([[[0.5, 1.0]]]))
