"""Segmentations lie on their image's grid, with as many axes, and never as half a file."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImage

from monai_petl.data import DataError, VolumeWriter, output_name
from monai_petl.data.volume_writer import write_volume
from monai_petl.data.volumes import read_array, read_grid
from tests.volumes import AFFINE


def saved(tmp_path, mask: torch.Tensor, name: str, ext: str = ".nii.gz", dtype: type = np.uint8, affine=AFFINE):
    image = MetaTensor(mask, affine=torch.as_tensor(affine), meta={"filename_or_obj": f"/in/{name}"})
    saver = SaveImage(
        tmp_path, "seg", ext, output_dtype=dtype, resample=False, separate_folder=False, writer=VolumeWriter,
        output_name_formatter=output_name, print_log=False,
    )  # fmt: skip
    saver(image)
    return tmp_path


@pytest.mark.parametrize("ext", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 1), (1, 4, 3), (5, 1, 1)])
def test_a_mask_has_the_axes_and_the_grid_of_its_image(tmp_path, ext, shape):
    affine = np.array([[0.0, -1.5, 0, 7], [2.0, 0, 0, -8], [0, 0, 3, 9], [0, 0, 0, 1]])
    mask = torch.arange(np.prod(shape)).remainder(3).reshape(1, *shape)
    saved(tmp_path, mask, "case.nii.gz", ext, affine=affine)
    path = tmp_path / f"case_seg{ext}"
    assert np.array_equal(read_array(path), mask[0].numpy())
    assert np.allclose(read_grid(path)[1], affine, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("1.2.3", "1.2.3"), ("C0.NII.GZ", "C0"), ("a.v2.nii.gz", "a.v2"), ("x.Mha", "x"), ("x.nrrd", "x")],
)
def test_the_output_is_called_like_the_input(tmp_path, name, stem):
    saved(tmp_path, torch.ones(1, 2, 2, 2), name)
    assert [path.name for path in tmp_path.iterdir()] == [f"{stem}_seg.nii.gz"]


def test_sheared_axes_are_kept_in_nifti_and_refused_elsewhere(tmp_path):
    affine = nib.affines.from_matvec(np.array([[2.0, 0.3, 0], [0, 2, 0], [0, 0, 3]]))
    write_volume(tmp_path / "a.nii.gz", np.ones((2, 2, 2), np.uint8), affine)
    assert np.allclose(read_grid(tmp_path / "a.nii.gz")[1], affine)
    with pytest.raises(DataError, match="not at right angles cannot be kept in NRRD"):
        write_volume(tmp_path / "a.nrrd", np.ones((2, 2, 2), np.uint8), affine)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


def test_values_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(RuntimeError) as error:
        saved(tmp_path, torch.full((1, 2, 2, 2), 300), "a.nii.gz")
    assert "values 300 to 300 do not fit uint8" in str(error.value.__cause__ or error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ext", [".nii.gz", ".nrrd"])
def test_a_full_disk_leaves_the_former_file(tmp_path, ext, monkeypatch):
    saved(tmp_path, torch.ones(1, 2, 2, 2), "a.nii.gz", ext)
    before = (tmp_path / f"a_seg{ext}").read_bytes()

    def full(image, name, *args, **kwargs):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    monkeypatch.setattr(sitk, "WriteImage", full)
    with pytest.raises(OSError, match=r"No space left on device.* MiB are free.* The former file is kept"):
        write_volume(tmp_path / f"a_seg{ext}", np.zeros((2, 2, 2), np.uint8), AFFINE)
    assert (tmp_path / f"a_seg{ext}").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
