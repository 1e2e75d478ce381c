"""Volumes: formats, geometry, and files that are none."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

from monai_petl.data import VolumeReader
from tests.inputs import Input
from tests.volumes import AFFINE, as_itk, raw_nifti, save, save_series, volume

OBLIQUE = nib.affines.from_matvec(
    np.array([[0.9397, -0.342, 0], [0.342, 0.9397, 0], [0, 0, 1]]) @ np.diag([-1.5, 1.5, 4]), [10, -20, 30]
)
RIGHT_HANDED = OBLIQUE @ np.diag([-1.0, 1, 1, 1])  # as the slices of a scanner are stacked
TURNED = {"qform_code": 1, "quatern_d": 1.0, "qoffset_x": 78.0, "qoffset_y": 70.0}


def read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """A volume as every bundle reads it."""
    reader = VolumeReader()
    return reader.get_data(reader.read(str(path)))


def same(name: str, affine: np.ndarray = AFFINE, voxels: np.ndarray | None = None) -> Callable[[Path], None]:
    """The volume that is read is the one that was written, voxel by voxel, in its place."""
    image = volume()[0] if voxels is None else voxels

    def check(folder: Path) -> None:
        path = save(folder / name, image, affine)
        found, meta = read(path)
        assert np.array_equal(found, image)
        assert np.allclose(meta["affine"], affine, atol=1e-5)
        assert tuple(meta["spatial_shape"]) == image.shape

    return check


def reads(make: Callable[[Path], Path], expected: np.ndarray | None = None) -> Callable[[Path], None]:
    """What ``make`` writes is read; as ``expected``, if that is given."""

    def check(folder: Path) -> None:
        found, _ = read(make(folder))
        assert expected is None or np.array_equal(found, expected)

    return check


def turned(**fields: Any) -> Callable[[Path], Path]:
    return lambda folder: raw_nifti(folder / "a.nii.gz", volume()[0], **fields)


def written(image: nib.Nifti1Image | sitk.Image, name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        sitk.WriteImage(image, str(folder / name)) if isinstance(image, sitk.Image) else nib.save(image, folder / name)
        return folder / name

    return make


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def series(**options: Any) -> Callable[[Path], Path]:
    return lambda folder: save_series(folder / "ct", volume()[0], **options)


def two_series(folder: Path) -> Path:
    save_series(folder / "ct", volume(0)[0])
    other = save_series(folder / "more", volume(1)[0], x="", **{"0020x000e": "1.2.4"})
    for path in other.iterdir():
        path.rename(folder / "ct" / f"b{path.name}")
    return folder / "ct"


def turned_slice(folder: Path) -> Path:
    save_series(folder / "ct", volume()[0])
    save_series(folder / "more", volume()[0], OBLIQUE)
    os.replace(folder / "more" / "003.dcm", folder / "ct" / "003.dcm")
    return folder / "ct"


def without_a_slice(folder: Path) -> Path:
    save_series(folder / "ct", volume()[0])
    (folder / "ct" / "003.dcm").unlink()
    return folder / "ct"


def truncated(folder: Path) -> Path:
    path = save(folder / "a.nii.gz", np.random.default_rng(0).normal(size=(40, 40, 20)).astype(np.float32))
    path.write_bytes(path.read_bytes()[:2000])
    return path


IMAGE, LABEL = volume()
SHEARED = nib.affines.from_matvec(np.array([[2.0, 0.3, 0], [0, 2, 0], [0, 0, 3]]), [0, 0, 0])
SCALED = nib.Nifti1Image(IMAGE, AFFINE)
SCALED.header.set_slope_inter(2.0, 10.0)
UNIT = nib.Nifti1Image(IMAGE, np.diag([0.002, 0.002, 0.003, 1.0]))
UNIT.header.set_xyzt_units("meter")

FORMATS = "Volumes: formats"
PLACES = "Volumes: geometry"
BROKEN = "Volumes: files that are none"
INPUTS = [
    *(
        Input(FORMATS, f"`{ending}`", same(f"a{ending}"))
        for ending in (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".NII.GZ", ".Nii")
    ),
    Input(FORMATS, "`.mgz`", same("a.mgz", voxels=IMAGE.astype(np.float32))),
    Input(FORMATS, "`.hdr` with `.img`", reads(written(nib.Nifti1Pair(IMAGE, AFFINE), "a.img"), IMAGE)),
    Input(FORMATS, "a folder of one DICOM series", same("a.dcm")),
    Input(FORMATS, "a DICOM series with rescale slope 2 and intercept -1000", reads(
        series(**{"0028x1052": "-1000", "0028x1053": "2"}), None)),
    Input(FORMATS, "a NIfTI file with `scl_slope` 2 and `scl_inter` 10", reads(written(SCALED, "a.nii.gz"))),
    Input(FORMATS, "big-endian NIfTI", reads(written(
        nib.Nifti1Image(IMAGE, AFFINE, nib.Nifti1Header(endianness=">")), "a.nii.gz"), IMAGE)),
    Input(FORMATS, "voxels of 32-bit floats", same("a.nrrd", voxels=IMAGE.astype(np.float32))),
    Input(FORMATS, "one slice, (H, W, 1)", same("a.nii.gz", voxels=IMAGE[:, :, :1])),
    Input(FORMATS, "one slice, (1, W, D)", same("a.nii.gz", voxels=IMAGE[:1])),
    Input(FORMATS, "two axes, (H, W)", reads(written(nib.Nifti1Image(IMAGE[:, :, 0], AFFINE), "a.nii"), IMAGE[:, :, :1])),
    Input(FORMATS, "four axes, (H, W, D, 1)", reads(written(nib.Nifti1Image(IMAGE[..., None], AFFINE), "a.nii"), IMAGE)),
    Input(FORMATS, "four axes, (H, W, D, 2)", reads(written(nib.Nifti1Image(np.stack([IMAGE] * 2, -1), AFFINE), "a.nii")),
          True, ("a.nii has 4 axes, (12, 10, 6, 2)", "Save each as a file")),
    Input(FORMATS, "NRRD with three values a voxel", reads(written(sitk.Compose([as_itk(IMAGE)] * 3), "a.nrrd")),
          True, ("a.nrrd has 4 axes", "Save each")),
    Input(FORMATS, "NIfTI with colours", reads(written(nib.Nifti1Image(
        np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), AFFINE), "a.nii.gz")), True, ("a.nii.gz holds colours",)),
    Input(FORMATS, "complex numbers", reads(written(nib.Nifti1Image(IMAGE.astype(np.complex64), AFFINE), "a.nii.gz")),
          True, ("a.nii.gz holds complex numbers",)),
    Input(PLACES, "axes along the body, left-right turned", same("a.nii.gz", np.diag([-2.0, 2.0, 3.0, 1.0]))),
    Input(PLACES, "oblique axes", same("a.nii.gz", OBLIQUE)),
    Input(PLACES, "oblique axes in NRRD", same("a.nrrd", OBLIQUE)),
    Input(PLACES, "oblique axes in a DICOM series", reads(series(affine=RIGHT_HANDED), IMAGE)),
    Input(PLACES, "sheared axes", same("a.nii.gz", SHEARED)),
    Input(PLACES, "qform alone", reads(turned(qform_code=1), IMAGE)),
    Input(PLACES, "sform and qform that agree", reads(turned(sform=AFFINE, sform_code=1, qform_code=1), IMAGE)),
    Input(PLACES, "sform (aligned) and qform (scanner) that differ", reads(turned(sform=AFFINE, sform_code=2, **TURNED)),
          True, ("a.nii.gz has two geometries", "set_qform")),
    Input(PLACES, "sform (MNI) and qform that differ", reads(turned(sform=AFFINE, sform_code=4, **TURNED)),
          True, ("a.nii.gz has two geometries", "LPS")),
    Input(PLACES, "sform and qform 0.002 mm apart", reads(turned(
        sform=AFFINE, sform_code=2, qform_code=1, qoffset_x=0.002)), True, ("two geometries",)),
    Input(PLACES, "neither sform nor qform, as in old Analyze files", reads(turned()), True, ("without sform and qform",)),
    Input(PLACES, "pixdim that differs from the sform", reads(turned(sform=np.diag([2, 2, 5, 1]), sform_code=1)),
          True, ("voxels of 2 x 2 x 5 mm", "voxels of 2 x 2 x 3 mm")),
    Input(PLACES, "negative pixdim", reads(turned(pixdim=(1, 2, 2, -3, 0, 0, 0, 0))), True, ("two geometries",)),
    Input(PLACES, "units of metres in the header", reads(written(UNIT, "a.nii.gz")), True, ("two geometries",)),
    Input(PLACES, "an sform of zeros", reads(turned(sform=np.zeros((3, 4)), sform_code=1)), True, ("a.nii.gz", "singular")),
    Input(PLACES, "an sform of NaN", reads(turned(sform=np.full((3, 4), np.nan), sform_code=1)), True, ("not finite",)),
    Input(PLACES, "a voxel size of 1000 mm", reads(written(nib.Nifti1Image(
        IMAGE, np.diag([1000.0, 2, 2, 1])), "a.nii.gz")), True, ("voxel size of 1000 x 2 x 2 mm", "unit")),
    Input(PLACES, "a voxel size of 0.00001 mm", reads(written(as_itk(IMAGE, np.diag([1e-5, 2, 2, 1])), "a.nrrd")),
          True, ("voxel size of 1e-05",)),
    Input(PLACES, "two axes along one line", reads(written(nib.Nifti1Image(
        IMAGE, np.array([[2.0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])), "a.nii.gz")), True, ("singular",)),
    Input(PLACES, "a DICOM series with gantry tilt", reads(series(shift=1.5)), True,
          ("ct lies askew by 26.6 degrees", "dcm2niix")),
    Input(PLACES, "a DICOM series with a slice missing", reads(without_a_slice), True, ("ct lacks slices", "3 to 6 mm")),
    Input(PLACES, "a DICOM series with uneven distances", reads(series(places=(0, 3, 6, 9, 13, 16))),
          True, ("ct lacks slices or has uneven ones: they lie 3 to 4 mm apart",)),
    Input(PLACES, "a DICOM series with two slices in one place", reads(series(places=(0, 3, 3, 6, 9, 12))),
          True, ("ct has two slices in one place",)),
    Input(PLACES, "a DICOM series with a slice that is turned", reads(turned_slice), True, ("ct mixes",)),
    Input(PLACES, "a folder with two DICOM series", reads(two_series), True, ("ct holds 2 DICOM series",)),
    Input(BROKEN, "a file that is not there", reads(lambda folder: folder / "a.nii.gz"), True, ("a.nii.gz is missing",)),
    Input(BROKEN, "an empty file", reads(content("a.nii.gz", b"")), True, ("a.nii.gz is an empty file",)),
    Input(BROKEN, "a text with the name of a volume", reads(content("a.nii.gz", b"no volume")), True,
          ("a.nii.gz cannot be read",)),
    Input(BROKEN, "a text with the name of a NRRD file", reads(content("a.nrrd", b"no volume")), True,
          ("a.nrrd cannot be read",)),
    Input(BROKEN, "a `.nii.gz` that is not packed by gzip", reads(content("a.nii.gz", b"\0" * 400)), True,
          ("a.nii.gz cannot",)),
    Input(BROKEN, "gzip of nothing", reads(content("a.nii.gz", gzip.compress(b""))), True, ("a.nii.gz cannot be read",)),
    Input(BROKEN, "a NIfTI file that is cut off", reads(truncated), True, ("a.nii.gz cannot be read",)),
    Input(BROKEN, "another ending", reads(content("a.txt", b"x")), True, ("a.txt has none of the endings of volumes",)),
    Input(BROKEN, "a folder without DICOM files", reads(lambda folder: folder), True, ("holds no DICOM series",)),
    Input(BROKEN, "a DICOM segmentation object", reads(series(**{"0008x0060": "SEG"})), True, ("modality SEG", "dcmqi")),
]  # fmt: skip
