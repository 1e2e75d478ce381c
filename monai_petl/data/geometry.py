"""Where voxels lie: one rule for the affine of a volume, and a refusal of what two programs would read differently.

The rule for NIfTI is nibabel's: the sform where its code is positive, else the qform where its code is, else pixdim. Other
programs, among them those built on ITK, prefer the qform in some files, or take the voxel size from pixdim alone. A file for
which both readings differ shows the patient in two places, so it is refused. Where ITK takes the sform as well, as for code 1,
a qform that differs changes nothing and is not looked at.
"""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

from monai_petl.data.errors import DataError
from monai_petl.data.nifti_header import header_alone

__all__ = ["MAX_SPACING", "MIN_SPACING", "Affine", "check_affine", "require_one_reading", "sitk_affine"]

Affine = NDArray[np.float64]
MIN_SPACING, MAX_SPACING = 1e-4, 100.0  # mm
MOST_MM, MOST_DEGREES = 1e-3, 1e-3


def check_affine(affine: Affine) -> None:
    """Refuse an affine (voxel -> mm) from which no place can be computed.

    Raises:
        DataError: to follow the file's name: not finite, singular, or a voxel size outside 0.0001 to 100 mm.
    """
    if not np.isfinite(affine).all():
        raise DataError(
            "has an affine that is not finite (NaN or infinity in its header). Write the right geometry into it"
        )
    spacing = nib.affines.voxel_sizes(affine)
    if (spacing == 0).any():
        raise DataError(
            f"has a voxel size of {_sizes(spacing)} mm: its affine is singular. Write the right geometry into its header"
        )
    if spacing.min() < MIN_SPACING or spacing.max() > MAX_SPACING:
        raise DataError(
            f"has a voxel size of {_sizes(spacing)} mm, where {MIN_SPACING:g} to {MAX_SPACING:g} mm is possible. Look whether "
            "its header means another unit"
        )
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise DataError(
            "has axes that lie in one plane: its affine is singular. Write the right geometry into its header"
        )


def require_one_reading(image: nib.Nifti1Pair, header: nib.Nifti1Header) -> None:
    """Refuse a NIfTI file whose geometry ITK reads otherwise than nibabel, by more than 0.001 mm or 0.001 degrees.

    Origin and voxel size are compared in mm, axes in degrees. Axes that are not at right angles are read by nibabel alone, and
    exactly.

    Args:
        image: as nibabel has opened it.
        header: as the file has it, see :func:`monai_petl.data.nifti_header.raw_header`.

    Raises:
        DataError: to follow the file's name, with both readings and the remedy.
    """
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NiftiImageIO")
    told = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # it would print the same in other words
    try:
        with header_alone(header) as path:
            reader.SetFileName(path)
            reader.ReadImageInformation()
    except RuntimeError:  # what ITK cannot read at all, it cannot read otherwise
        return
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(told)
    ours, theirs = _three(np.asarray(image.affine, np.float64)), _three(sitk_affine(reader))
    if _same(ours, theirs, min(image.ndim, 3), _rounding(image)):
        return
    form, code = _form(image)
    raise DataError(
        f"has two geometries: its {form} (code {code}) says {_words(ours)}, and programs that read its qform or pixdim find "
        f"{_words(theirs)}. Find out which is right and write it to both, with nibabel: "
        "image.set_sform(affine, 1); image.set_qform(affine, 1)"
    )


def sitk_affine(image: sitk.Image | sitk.ImageFileReader) -> Affine:
    """Affine (voxel -> mm, RAS) of a SimpleITK image, whose own axes run to the left and to the back."""
    n = image.GetDimension()
    affine = np.eye(n + 1)
    affine[:n, :n] = np.array(image.GetDirection()).reshape(n, n) * np.array(image.GetSpacing())
    affine[:n, n] = image.GetOrigin()
    affine[:2] *= -1
    return affine


def _three(affine: Affine) -> Affine:
    """The affine of the first three axes."""
    n = min(len(affine) - 1, 3)
    result = np.eye(4)
    result[:n, :n], result[:n, 3] = affine[:n, :n], affine[:n, -1]
    return result


def _same(ours: Affine, theirs: Affine, axes: int, slack: float) -> bool:
    """Whether two affines agree on the first axes, all that the file has."""
    if np.abs(ours[:3, 3] - theirs[:3, 3]).max() > MOST_MM:
        return False
    spacing, other = (np.linalg.norm(affine[:3, :axes], axis=0) for affine in (ours, theirs))
    if np.abs(spacing - other).max() > MOST_MM or not other.all():
        return False
    first, second = ours[:3, :axes] / spacing, theirs[:3, :axes] / other
    chord = np.linalg.norm(first - second, axis=0).max()  # between the ends of unit vectors
    return bool(math.degrees(2 * math.asin(min(chord / 2, 1))) <= MOST_DEGREES + slack)


def _rounding(image: nib.Nifti1Image) -> float:
    """Degrees by which a rotation by nearly 180 degrees is rounded in a qform.

    A NIfTI header keeps three numbers of the quaternion in single precision; the fourth, a = sqrt(1 - b² - c² - d²), is lost
    to rounding where it is small.
    """
    b, c, d = (float(image.header[f"quatern_{name}"]) for name in "bcd")
    a = math.sqrt(max(1 - b * b - c * c - d * d, 0))
    return (
        math.degrees(2 * min(math.sqrt(2.4e-7), 2.4e-7 / max(a, 1e-12))) if int(image.header["qform_code"]) > 0 else 0
    )


def _form(image: nib.Nifti1Image) -> tuple[str, int]:
    for name in ("sform", "qform"):
        code = int(image.header[f"{name}_code"])
        if code > 0:
            return name, code
    return "header without sform and qform", 0


def _words(affine: Affine) -> str:
    origin = " ".join(f"{value + 0.0:.4g}" for value in affine[:3, 3])
    return f"{''.join(nib.aff2axcodes(affine))} axes, voxels of {_sizes(nib.affines.voxel_sizes(affine))} mm, origin {origin}"


def _sizes(spacing: NDArray[np.float64]) -> str:
    return " x ".join(f"{value:.4g}" for value in spacing)
