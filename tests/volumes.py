"""Volumes that tests write: small, with geometry of every kind, in every format."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
SHAPE = (12, 10, 6)
CT = "1.2.840.10008.5.1.4.1.1.2"


def volume(seed: int = 0, shape: Sequence[int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, D) of int16 and its label of two classes."""
    image = np.random.default_rng(seed).integers(-100, 200, shape).astype(np.int16)
    label = np.zeros(shape, np.uint8)
    label[1:4, 1:5] = 1
    label[6:9, 5:9] = 2
    return image, label


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write as the ending says; a folder for ``.dcm``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".dcm"):
        return save_series(path.with_suffix(""), voxels, affine)
    if path.name.lower().endswith((".nii", ".nii.gz")):
        lower = path.with_name(path.name.lower())
        nib.save(nib.Nifti1Image(voxels, affine, dtype=voxels.dtype), lower)
        return lower if lower == path else lower.rename(path)
    if path.name.endswith((".mgz", ".mgh")):
        nib.save(nib.MGHImage(voxels.astype(np.float32), affine), path)
    else:
        sitk.WriteImage(as_itk(voxels, affine), str(path))
    return path


def as_itk(voxels: np.ndarray, affine: np.ndarray = AFFINE) -> sitk.Image:
    flipped = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(flipped[:3, :3], axis=0)
    image = sitk.GetImageFromArray(voxels.T)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(flipped[:3, 3].tolist())
    image.SetDirection((flipped[:3, :3] / spacing).ravel().tolist())
    return image


def save_series(
    folder: Path,
    voxels: np.ndarray,
    affine: np.ndarray = AFFINE,
    shift: float = 0.0,
    places: Sequence[float] | None = None,
    **tags: str,
) -> Path:
    """A DICOM series, a file a slice; ``shift`` moves each by so many mm in its plane, ``places`` says where they lie (mm)."""
    folder.mkdir(parents=True, exist_ok=True)
    flipped = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(flipped[:3, :3], axis=0)
    axes = flipped[:3, :3] / spacing
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(voxels.shape[2]):
        image = sitk.GetImageFromArray(voxels[:, :, k].T.astype(np.int16))
        image.SetSpacing(spacing[:2].tolist())
        along = k * spacing[2] if places is None else places[k]
        origin = flipped[:3, 3] + axes[:, 2] * along + axes[:, 1] * k * shift
        values = {
            "0008|0060": "CT", "0008|0016": CT, "0008|0018": f"1.2.3.{k + 1}", "0020|000e": "1.2.3", "0020|000d": "1.2.9",
            "0020|0032": "\\".join(f"{value:.6f}" for value in origin),
            "0020|0037": "\\".join(f"{value:.6f}" for value in axes[:, :2].T.ravel()),
            "0020|0013": str(k + 1),
            **{name.replace("x", "|"): value for name, value in tags.items()},
        }  # fmt: skip
        for tag, value in values.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{k:03d}.dcm"))
        writer.Execute(image)
    return folder


def raw_nifti(path: Path, voxels: np.ndarray, **fields: Any) -> Path:
    """A NIfTI file with these fields of its header, which no library would write."""
    header = nib.Nifti1Header()
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header["pixdim"][:4] = (1, 2, 2, 3)
    header["magic"], header["vox_offset"] = b"n+1", 352
    sform = fields.pop("sform", None)
    if sform is not None:
        header["srow_x"], header["srow_y"], header["srow_z"] = np.asarray(sform)[:3]
    for name, value in fields.items():
        header[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") as file:
        file.write(header.binaryblock + b"\0" * 4 + voxels.tobytes(order="F"))
    return path


def dataset(root: Path, count: int = 4, ending: str = ".nii.gz", labels: dict[str, str] | None = None) -> Path:
    """A Decathlon folder: two cases for training at least, one for validation, one for test; liver and spleen."""
    cases = []
    for index in range(count):
        case = {}
        for kind, voxels in zip(("image", "label"), volume(index), strict=True):
            path = save(root / f"{kind}sTr" / f"c{index}{ending}", voxels)
            case[kind] = str(path.relative_to(root))
        cases.append(case)
    table = labels or {"0": "background", "1": "liver", "2": "spleen"}
    contents = {"labels": table, "training": cases[:-2], "validation": cases[-2:-1], "test": cases[-1:]}
    (root / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")
    return root


def plain_folders(root: Path, count: int = 5, ending: str = ".nii.gz") -> Path:
    """Folders ``images`` and ``labels`` with a table of classes, and no list."""
    for index in range(count):
        for kind, voxels in zip(("images", "labels"), volume(index), strict=True):
            save(root / kind / f"c{index}{ending}", voxels)
    (root / "labels.json").write_text('{"1": "liver", "2": "spleen"}', encoding="utf-8")
    return root


def set_dicom(path: Path, tag: tuple[int, int], value: str | bytes | None) -> None:
    """Change a field of a DICOM file that :func:`save_series` has written (implicit, little-endian), or leave it out."""
    content, at = path.read_bytes(), 132
    mark = struct.pack("<HH", *tag)
    if value is None and mark not in content:
        return
    at = content.index(mark, at)
    length = struct.unpack_from("<I", content, at + 4)[0]
    new = b""
    if value is not None:
        held = value if isinstance(value, bytes) else value.encode()
        held += b" " * (len(held) % 2)
        new = mark + struct.pack("<I", len(held)) + held
    path.write_bytes(content[:at] + new + content[at + 8 + length :])


def add_dicom(path: Path, before: tuple[int, int], tag: tuple[int, int], value: str) -> None:
    """Put a field into a DICOM file, before another one."""
    content = path.read_bytes()
    at = content.index(struct.pack("<HH", *before), 132)
    held = value.encode() + b" " * (len(value) % 2)
    path.write_bytes(content[:at] + struct.pack("<HHI", *tag, len(held)) + held + content[at:])
