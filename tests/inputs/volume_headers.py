"""Volumes: headers that libraries would mend or pass over without a word, and files that are damaged."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from monai_petl.data import VolumeReader
from tests.inputs import Input
from tests.inputs.volumes import TURNED, reads
from tests.volumes import AFFINE, add_dicom, raw_nifti, save, save_series, set_dicom, volume

IMAGE = volume()[0]
RESCALE_SLOPE, PIXEL_SPACING, FRAMES, ROWS = (0x28, 0x1053), (0x28, 0x30), (0x28, 8), (0x28, 0x10)
POSITION, ORIENTATION, PHOTOMETRY, PATIENT = (0x20, 0x32), (0x20, 0x37), (0x28, 4), (0x10, 0x20)
STRAIGHT = np.diag([-2.0, -2.0, 3.0, 1.0])


def nifti(name: str = "a.nii.gz", **fields: object) -> Callable[[Path], Path]:
    good = {"sform": AFFINE, "sform_code": 1}
    return lambda folder: raw_nifti(folder / name, IMAGE, **{**good, **fields})


def nrrd(directions: str = "(2,0,0) (0,2,0) (0,0,3)", space: str = "right-anterior-superior", more: str = ""):
    """An NRRD file with this geometry; fields without a value are left out."""
    fields = [
        f"space: {space}",
        f"space directions: {directions}",
        "space origin: (0,0,0)" if space else "space origin: ",
    ]
    kept = [field for field in fields if not field.endswith(": ")]
    head = ["NRRD0004", "type: int16", "dimension: 3", "sizes: 12 10 6", *kept, "endian: little", "encoding: raw"]
    text = "\n".join(head + ([more] if more else [])) + "\n\n"
    return content("a.nrrd", text.encode() + IMAGE.tobytes(order="F"))


def metaimage(
    size: str = "ElementSpacing = 2 2 3\n", more: str = "", data: str = "LOCAL", turn: str = "1 0 0 0 1 0 0 0 1"
):
    """A MetaImage file with this geometry."""
    text = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"TransformMatrix = {turn}\nOffset = 0 0 0\n{size}DimSize = 12 10 6\n{more}"
        f"ElementType = MET_SHORT\nElementDataFile = {data}\n"
    )
    return content("a.mha", text.encode() + IMAGE.tobytes(order="F"))


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def renamed(name: str, like: str) -> Callable[[Path], Path]:
    """A file of a format under a name in other letters."""
    return lambda folder: save(folder / like, IMAGE.astype(np.float32) if "mgz" in like else IMAGE).rename(
        folder / name
    )


def changed(name: str, change: Callable[[bytes], bytes], voxels: np.ndarray = IMAGE) -> Callable[[Path], Path]:
    """A file whose bytes are changed after it was written."""

    def make(folder: Path) -> Path:
        path = save(folder / name, voxels)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def series(change: Callable[[int, Path], None], **options: object) -> Callable[[Path], Path]:
    """A DICOM series whose files are changed one by one."""

    def make(folder: Path) -> Path:
        path = save_series(folder / "ct", IMAGE, STRAIGHT, **options)
        for index, file in enumerate(sorted(path.iterdir())):
            change(index, file)
        return path

    return make


def field(tag: tuple[int, int], value: str | None, only: int | None = None) -> Callable[[int, Path], None]:
    """Set a field, or leave it out, in all slices or in one of them."""

    def change(index: int, path: Path) -> None:
        if only is None or index == only:
            set_dicom(path, tag, value)

    return change


def cut(which: int) -> Callable[[int, Path], None]:
    return lambda index, path: (path.write_bytes(path.read_bytes()[:300]), None)[1] if index == which else None


def by_slopes(folder: Path) -> None:
    """As in PET: a slope of its own for each slice; the first alone would fit whole numbers."""
    slopes = [1, 0.5, 0.25, 1, 1000, 1]
    path = series(lambda index, file: set_dicom(file, RESCALE_SLOPE, str(slopes[index])))(folder)
    reader = VolumeReader()
    assert np.array_equal(reader.get_data(reader.read(str(path)))[0], IMAGE * np.array(slopes))


def one_slice(folder: Path) -> None:
    """A single slice is as thick as its header says."""
    path = save_series(folder / "ct", IMAGE[:, :, :1], STRAIGHT)
    add_dicom(path / "000.dcm", (0x20, 0xD), (0x18, 0x50), "5")
    reader = VolumeReader()
    found, meta = reader.get_data(reader.read(str(path)))
    assert np.array_equal(found, IMAGE[:, :, :1])
    assert np.allclose(meta["affine"], np.diag([-2.0, -2.0, 5.0, 1.0]))


def one_slice_of_no_thickness(folder: Path) -> Path:
    path = save_series(folder / "ct", IMAGE[:, :, :1], STRAIGHT)
    set_dicom(path / "000.dcm", (0x18, 0x88), None)
    return path


def beside(folder: Path) -> Path:
    path = save_series(folder / "ct", IMAGE, STRAIGHT)
    (path / "report.pdf").write_bytes(b"%PDF")
    return path


def analyze(kind: type) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        kind.to_filename(kind(IMAGE, None), folder / "a.img")
        return folder / "a.img"

    return make


def cifti(folder: Path) -> Path:
    axes = (
        nib.cifti2.ScalarAxis(["a"]),
        nib.cifti2.BrainModelAxis.from_mask(np.ones((3, 3, 3), bool), "thalamus_left", AFFINE),
    )
    nib.save(nib.Cifti2Image(np.zeros((1, 27), np.float32), axes), folder / "a.nii")
    return folder / "a.nii"


def second_nifti(folder: Path) -> Path:
    """NIfTI-2, with two geometries."""
    image = nib.Nifti2Image(IMAGE, AFFINE)
    image.set_qform(nib.affines.from_matvec(np.diag([-2.0, -2.0, 3.0]), [78, 70, 0]), 1)
    image.set_sform(AFFINE, 2)
    nib.save(image, folder / "a.nii.gz")
    return folder / "a.nii.gz"


def without_voxels(folder: Path) -> Path:
    nib.save(nib.Nifti1Pair(IMAGE, AFFINE), folder / "a.img")
    (folder / "a.img").unlink()
    return folder / "a.hdr"


def unpacked(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: gzip.compress(change(gzip.decompress(data)))


def wrong_checksum(data: bytes) -> bytes:
    return data[:-8] + struct.pack("<I", struct.unpack("<I", data[-8:-4])[0] ^ 1) + data[-4:]


HEADERS, DICOM, DAMAGED = "Volumes: headers", "Volumes: DICOM series", "Volumes: damaged files"
FLOATS = IMAGE.astype(np.float32)
INPUTS = [
    *(
        Input(HEADERS, f"`{name[1:]}`", reads(renamed(name, like), IMAGE))
        for name, like in (("a.Mha", "a.mha"), ("a.MHA", "a.mha"), ("a.NRRD", "a.nrrd"), ("a.Nii.Gz", "a.nii.gz"), ("a.MGZ", "a.mgz"))
    ),
    Input(HEADERS, "a detached header, `.nhdr`", reads(renamed("a.nhdr", "a.nhdr"), IMAGE)),
    Input(HEADERS, "two geometries in a file called `.Nii.gz`", reads(nifti("a.Nii.gz", sform_code=2, **TURNED)), True,
          ("a.Nii.gz has two geometries",)),
    Input(HEADERS, "two geometries in NIfTI-2", reads(second_nifti), True, ("a.nii.gz has two geometries",)),
    Input(HEADERS, "a qform with a pixdim of zero", reads(nifti(
        sform_code=0, qform_code=1, pixdim=(1, 0, 2, 3, 0, 0, 0, 0))), True, ("a.nii.gz has a voxel size of 0 x 2 x 3",)),
    Input(HEADERS, "a qform with an infinite pixdim", reads(nifti(
        sform_code=0, qform_code=1, pixdim=(1, np.inf, 2, 3, 0, 0, 0, 0))), True, ("a.nii.gz has an affine that is not finite",)),
    Input(HEADERS, "`scl_slope` of zero or NaN: no scaling", reads(nifti(scl_slope=np.nan), IMAGE)),
    Input(HEADERS, "`scl_inter` of NaN", reads(nifti(scl_slope=2, scl_inter=np.nan)), True, ("a.nii.gz cannot be read",)),
    Input(HEADERS, "voxels that begin within the header", reads(nifti(vox_offset=0)), True, ("a.nii.gz", "vox_offset")),
    Input(HEADERS, "more voxels than the file can hold", reads(nifti(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])), True,
          ("a.nii.gz is cut off, or its header is wrong: it promises 54,000,000,000,352 bytes",)),
    Input(HEADERS, "a negative number of voxels", reads(nifti(dim=[3, -12, 10, 6, 1, 1, 1, 1])), True, ("has no voxels",)),
    Input(HEADERS, "Analyze 7.5", reads(analyze(nib.AnalyzeImage)), True, ("a.img is no NIfTI volume", "which side is left")),
    Input(HEADERS, "Analyze of SPM99", reads(analyze(nib.Spm99AnalyzeImage)), True, ("a.img is no NIfTI volume",)),
    Input(HEADERS, "CIFTI", reads(cifti), True, ("a.nii is no NIfTI volume but of the kind Cifti2Image",)),
    Input(HEADERS, "MGH without its place", reads(changed("a.mgz", unpacked(
        lambda data: data[:28] + b"\0\0" + data[30:]), FLOATS)), True, ("a.mgz does not say where", "mri_convert")),
    Input(HEADERS, "MGH without voxels", reads(changed("a.mgz", unpacked(
        lambda data: data[:4] + b"\0" * 4 + data[8:]), FLOATS)), True, ("a.mgz cannot be read",)),
    Input(HEADERS, "NRRD to the right, front and head", reads(nrrd(), IMAGE)),
    Input(HEADERS, "NRRD without a space", reads(nrrd("", "", "spacings: 2 2 3")), True, ("a.nrrd names no space",)),
    Input(HEADERS, "NRRD of the scanner's space", reads(nrrd(space="scanner-xyz")), True, ("a.nrrd names the space",)),
    Input(HEADERS, "NRRD without a voxel size", reads(nrrd("", "")), True, ("a.nrrd does not say how large its voxels are",)),
    Input(HEADERS, "NRRD in cm", reads(nrrd(more='space units: "cm" "cm" "cm"')), True, ("a.nrrd gives its geometry in cm",)),
    Input(HEADERS, "NRRD with two axes along one line", reads(nrrd("(2,0,0) (2,0,0) (0,0,3)")), True, ("determinant is 0",)),
    Input(HEADERS, "MetaImage without a voxel size", reads(metaimage("")), True, ("a.mha does not say how large",)),
    Input(HEADERS, "MetaImage with a negative voxel size", reads(metaimage("ElementSpacing = 2 2 -3\n")), True,
          ("a.mha has a voxel size of 2 x 2 x -3",)),
    Input(HEADERS, "MetaImage with a voxel size of zero", reads(metaimage("ElementSpacing = 2 0 3\n")), True,
          ("a.mha has a voxel size of 2 x 0 x 3",)),
    Input(HEADERS, "MetaImage in µm", reads(metaimage(more="DistanceUnits = um\n")), True, ("a.mha gives its geometry in um",)),
    Input(HEADERS, "MetaImage with directions of length 2", reads(metaimage(turn="2 0 0 0 2 0 0 0 2")), True,
          ("a.mha has directions of length 2",)),
    Input(DICOM, "a rescale slope of its own for each slice, as in PET", by_slopes),
    Input(DICOM, "one slice of 5 mm", one_slice),
    Input(DICOM, "one slice without a thickness", reads(one_slice_of_no_thickness), True,
          ("ct does not say", "no slice thickness")),
    Input(DICOM, "file names `.IMA`", reads(series(lambda index, path: (path.rename(path.with_suffix(".IMA")), None)[1]), IMAGE)),
    Input(DICOM, "a report beside the slices", reads(beside, IMAGE), says=("not read: report.pdf",)),
    Input(DICOM, "a tilt of 0.5 degrees", reads(series(lambda index, path: None, shift=0.0262)), True,
          ("ct lies askew by 0.5", "dcm2niix")),
    Input(DICOM, "slices without positions", reads(series(field(POSITION, None))), True, ("ct does not say", "no position")),
    Input(DICOM, "slices without an orientation", reads(series(field(ORIENTATION, None))), True, ("no orientation",)),
    Input(DICOM, "an orientation of zeros", reads(series(field(ORIENTATION, "0\\0\\0\\0\\0\\0"))), True, ("no orientation",)),
    Input(DICOM, "axes that are not at right angles", reads(series(field(ORIENTATION, "1\\0\\0\\0.5\\0.866\\0"))), True,
          ("no orientation", "right angles")),
    Input(DICOM, "slices without a pixel spacing", reads(series(field(PIXEL_SPACING, None))), True, ("no pixel spacing",)),
    Input(DICOM, "a pixel spacing of zero", reads(series(field(PIXEL_SPACING, "0\\0"))), True, ("no pixel spacing",)),
    Input(DICOM, "a slice of another pixel spacing", reads(series(field(PIXEL_SPACING, "2\\2.01", 3))), True,
          ("ct mixes slices", "003.dcm")),
    Input(DICOM, "a slice of another patient", reads(series(field(PATIENT, "B", 3))), True, ("ct mixes patients", "'B'")),
    Input(DICOM, "an inverted slice (MONOCHROME1)", reads(series(field(PHOTOMETRY, "MONOCHROME1", 3))), True,
          ("ct mixes kinds of grey values",)),
    Input(DICOM, "several slices in one file", reads(series(lambda index, path: add_dicom(path, ROWS, FRAMES, "2"))), True,
          ("holds many slices in one file", "dcm2niix")),
    Input(DICOM, "the first slice is cut off", reads(series(cut(0))), True, ("ct holds DICOM files that cannot be read", "000.dcm")),
    Input(DICOM, "the last slice is cut off", reads(series(cut(5))), True, ("ct holds DICOM files that cannot be read", "005.dcm")),
    Input(DICOM, "an empty slice", reads(series(lambda index, path: path.write_bytes(b"") and None if index == 5 else None)),
          True, ("ct holds DICOM files that cannot be read", "005.dcm")),
    Input(DAMAGED, "NIfTI with a wrong checksum", reads(changed("a.nii.gz", wrong_checksum)), True, ("a.nii.gz cannot", "CRC")),
    Input(DAMAGED, "`.nii` that is cut off", reads(changed("a.nii", lambda data: data[:-300])), True,
          ("a.nii is cut off, or its header is wrong",)),
    Input(DAMAGED, "`.mgz` that is cut off", reads(changed("a.mgz", lambda data: data[: len(data) // 2], FLOATS)), True,
          ("a.mgz cannot be read",)),
    Input(DAMAGED, "`.mha` that is cut off", reads(changed("a.mha", lambda data: data[:-300])), True,
          ("a.mha cannot be read: its voxels are cut off",)),
    Input(DAMAGED, "`.nrrd` that is cut off", reads(changed("a.nrrd", lambda data: data[:-300])), True, ("a.nrrd cannot be read",)),
    Input(DAMAGED, "`.mhd` without its voxels", reads(metaimage(data="a.raw")), True, ("a.mha lacks its voxels", "a.raw")),
    Input(DAMAGED, "`.hdr` without its `.img`", reads(without_voxels), True, ("a.hdr lacks its voxels: they are in a.img",)),
    Input(DAMAGED, "a NIfTI file packed but called `.nii`", reads(content("a.nii", gzip.compress(b"\0" * 2000))), True,
          ("a.nii cannot be read",)),
    Input(DAMAGED, "a picture called `.nii`", reads(content("a.nii", b"\x89PNG\r\n\x1a\n" + b"\0" * 2000)), True,
          ("a.nii cannot be read",)),
]  # fmt: skip
