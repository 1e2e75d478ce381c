"""What a NIfTI or MGH file says of itself before a library mends it.

nibabel replaces a voxel size of zero by 1 mm, drops the sign of a negative one, and reads voxels from within the header where
the header says so; ITK does some of this in another way. Here the header is read as it lies in the file.
"""

from __future__ import annotations

import gzip
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np

from monai_petl.data.errors import DataError
from monai_petl.data.whole_voxels import packed

__all__ = ["header_alone", "raw_header", "require_sound_mgh", "require_sound_nifti"]

GEOMETRY = (
    *("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
MGH_PLACE_KNOWN = slice(28, 30)  # goodRASFlag: two bytes, big-endian


def raw_header(image: nib.Nifti1Pair) -> nib.Nifti1Header:
    """The header of an open image as its file has it, with nothing mended."""
    kind = type(image.header)
    name = os.fspath(image.file_map.get("header", image.file_map["image"]).filename)
    return kind(_beginning(name, kind.template_dtype.itemsize), check=False)


@contextmanager
def header_alone(header: nib.Nifti1Header) -> Iterator[str]:
    """A NIfTI-1 file with the geometry of a header and no voxels, for readers that go by the name and know no NIfTI-2."""
    plain = nib.Nifti1Header()
    plain["datatype"], plain["bitpix"], plain["magic"], plain["vox_offset"] = 2, 8, b"n+1", 352
    plain["dim"] = np.minimum(header["dim"], np.iinfo(np.int16).max)
    plain["xyzt_units"] = int(header["xyzt_units"]) & 0xFF
    for field in GEOMETRY:
        plain[field] = header[field]
    with tempfile.TemporaryDirectory(prefix="monai_petl") as folder:
        path = Path(folder) / "header.nii"
        path.write_bytes(plain.binaryblock + b"\0" * 4)
        yield str(path)


def require_sound_nifti(image: nib.Nifti1Pair, header: nib.Nifti1Header) -> None:
    """Refuse a header whose voxel size is not positive, or whose voxels would begin within it.

    Raises:
        DataError: to follow the file's name.
    """
    axes = min(max(int(header["dim"][0]), 0), 3)
    sizes = np.asarray(header["pixdim"][1 : axes + 1], dtype=np.float64)
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        said = " x ".join(f"{size:g}" for size in sizes)
        raise DataError(
            f"has a voxel size of {said} in its header (pixdim), where positive numbers of mm are expected. Write the right "
            "sizes into it, with nibabel: image.header.set_zooms"
        )
    begin = float(header["vox_offset"])
    if "header" not in image.file_map and begin < header.sizeof_hdr:
        raise DataError(
            f"says that its voxels begin at byte {begin:g} (vox_offset), which is within its header of {header.sizeof_hdr} "
            "bytes. Export it again, with nibabel or dcm2niix"
        )


def require_sound_mgh(path: Path) -> None:
    """Refuse an MGH file that does not say where it lies; nibabel would assume a coronal volume of 1 mm.

    Raises:
        DataError: to follow the file's name.
    """
    known = _beginning(os.fspath(path), 30)[MGH_PLACE_KNOWN]
    if len(known) < 2 or struct.unpack(">h", known)[0] <= 0:
        raise DataError(
            "does not say where its voxels lie (goodRASFlag is 0). Write the geometry into it, with mri_convert for instance"
        )


def _beginning(name: str, size: int) -> bytes:
    opened = gzip.open if packed(name) else open
    with opened(name, "rb") as file:
        return file.read(size)
