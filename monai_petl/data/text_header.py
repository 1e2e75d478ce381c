"""What the headers of NRRD and MetaImage files say of the geometry, where ITK would guess.

Both begin with lines of text. ITK takes 1 mm where no voxel size is given, reads axes of an unknown space as if they ran to the
left and to the back, and leaves units aside.

References: https://teem.sourceforge.net/nrrd/format.html and https://itk.org/Wiki/MetaIO/Documentation.
"""

from __future__ import annotations

import math
from pathlib import Path

from monai_petl.data.errors import DataError

__all__ = ["require_sound_text_header"]

MOST_BYTES = 1 << 16
SPACES = {
    *("right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps"),
    *(f"{name}-time" for name in ("right-anterior-superior", "left-anterior-superior", "left-posterior-superior")),
    *("rast", "last", "lpst"),
}  # fmt: skip
AGAIN = "Write it again with SimpleITK or 3D Slicer"


def require_sound_text_header(path: Path, ending: str) -> None:
    """Refuse a header from which the place of the voxels would be a guess.

    Args:
        path: an NRRD or MetaImage file.
        ending: its ending in lower case.

    Raises:
        DataError: to follow the file's name: the voxel size, the space or the voxels are not there, or the unit is not mm.
    """
    with path.open("rb") as file:
        lines = file.read(MOST_BYTES).decode("latin-1").splitlines()
    if ending in (".nrrd", ".nhdr"):
        _check_nrrd(_fields(lines, ":", last=""))
    else:
        _check_metaimage(_fields(lines, "=", last="elementdatafile"), path)


def _fields(lines: list[str], sign: str, last: str) -> dict[str, str]:
    """The fields by their names in lower case, up to the line that ends the header."""
    fields: dict[str, str] = {}
    for line in lines:
        name, found, value = line.partition(sign)
        name = name.strip().lower()
        if found and not name.startswith("#") and not value.startswith("="):  # NRRD's := sets values of the user's own
            fields.setdefault(name, value.strip())
        if name == last:
            break
    return fields


def _check_nrrd(fields: dict[str, str]) -> None:
    if "dimension" not in fields:
        return  # no NRRD file; the reader says so
    directions = fields.get("space directions", "").lower()
    if "none" in directions and fields["dimension"] != "3":
        raise DataError(
            f"has {fields['dimension']} axes, of which one is no direction in space: it holds several channels or times. Save "
            "each as a file of its own"
        )
    sizes = [_number(text) for text in fields.get("spacings", "").split()[:3]]
    if not directions and not (sizes and all(size > 0 for size in sizes)):
        raise DataError(f"does not say how large its voxels are (space directions). {AGAIN}")
    space = fields.get("space", "").lower()
    if space not in SPACES:
        said = f"the space {space!r}, which names no sides of the body" if space else "no space"
        raise DataError(
            f"names {said}, so which way its axes run would be a guess. Write 'space: left-posterior-superior', or what is "
            "right, into its header"
        )
    units = {unit.strip('"').lower() for unit in fields.get("space units", fields.get("units", "")).split()}
    _require_millimetres(units - {"", "none", "???"})


def _check_metaimage(fields: dict[str, str], path: Path) -> None:
    if "ndims" not in fields:
        return
    sizes = [_number(text) for text in fields.get("elementspacing", fields.get("elementsize", "")).split()[:3]]
    if not sizes:
        raise DataError(f"does not say how large its voxels are (ElementSpacing). {AGAIN}")
    if not all(size > 0 for size in sizes):
        said = " x ".join(f"{size:g}" for size in sizes)
        raise DataError(
            f"has a voxel size of {said} (ElementSpacing), where positive numbers of mm are expected. {AGAIN}"
        )
    _require_millimetres({fields.get("distanceunits", "").lower()} - {"", "?"})
    voxels = fields.get("elementdatafile", "LOCAL")
    alone = voxels.split()[0].upper() not in ("LOCAL", "LIST") and "%" not in voxels if voxels else False
    if alone and not (path.parent / voxels).is_file():
        raise DataError(f"lacks its voxels: they are in {voxels}, which is not there. Copy both files into one folder")


def _require_millimetres(units: set[str]) -> None:
    if units - {"mm", "millimeter", "millimeters", "millimetre", "millimetres"}:
        raise DataError(f"gives its geometry in {', '.join(sorted(units))}, where mm are expected. {AGAIN}, in mm")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
