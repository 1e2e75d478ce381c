"""What lies in the folders of a data set: volumes by their names, and what is left out, with the reason."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from monai_petl.data.dicom import series_ids
from monai_petl.data.errors import DataError, PathLike

__all__ = ["VOLUME_ENDINGS", "Listing", "ending_of", "list_volumes", "stem"]

VOLUME_ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh", ".img", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd")
DICOM = (".dcm", ".dicom", ".ima", "")  # endings of the slices of a series
COMPANIONS = (".raw", ".zraw", ".raw.gz", ".json")  # voxels of .mhd and .nhdr, and what dcm2niix writes beside an image


def ending_of(path: PathLike) -> str:
    """The ending of a volume in lower case, ``.nii.gz`` as one; nothing for other files."""
    name = os.path.basename(path).lower()
    return next((ending for ending in VOLUME_ENDINGS if name.endswith(ending)), "")


def stem(path: PathLike) -> str:
    """File name without the ending of a volume, ``scan.v2.NII.GZ`` -> ``scan.v2``; in composed Unicode (NFC), so that names
    from macOS and from elsewhere are equal."""
    name = os.path.basename(path)
    return unicodedata.normalize("NFC", name[: len(name) - len(ending_of(name))])


@dataclass
class Listing:
    """Attributes:
    volumes: name of the case -> file, or folder of a DICOM series.
    left_out: files that are no volumes, each with the reason.
    """

    volumes: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def list_volumes(folder: Path, channels: bool = False) -> Listing:
    """The volumes of a folder; folders below it count where they hold one DICOM series.

    Args:
        folder: may be absent, and holds nothing then.
        channels: whether names end in nnU-Net's number of the channel, ``_0000``.

    Raises:
        DataError: two files have one name, as ``a.nii`` beside ``a.nii.gz``; or a case has several channels.
    """
    found = Listing()
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    names = {entry.name.lower() for entry in entries}
    for entry in entries:
        reason = _no_volume(entry, names)
        if reason is None:
            name = stem(entry)
            if channels:
                name = _without_channel(name, entry, names)
            if name in found.volumes:
                raise DataError(
                    f"{found.volumes[name].name} and {entry.name} in {folder} are both called {name}; keep one of them"
                )
            found.volumes[name] = entry
        elif reason:
            found.left_out.append(f"{entry.relative_to(folder.parent)} ({reason})")
    return found


def _no_volume(entry: Path, names: set[str]) -> str | None:
    """Why this is no volume of its own: nothing to say of a part of another one, and ``None`` for a volume."""
    ending, name = ending_of(entry), entry.name.lower()
    if entry.is_symlink() and not entry.exists():
        return "a link to nothing"
    if name.startswith(("._", "__macosx")) or name in (".ds_store", "thumbs.db", "desktop.ini"):
        return "left by an operating system"
    if name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return None if _is_series(entry) else "a folder without a DICOM series"
    if ending == ".hdr" and f"{name[:-4]}.img" in names:
        return ""
    if ending == ".img" and f"{name[:-4]}.hdr" not in names:
        return "without its .hdr file"
    if ending:
        return None
    return "" if name.endswith(COMPANIONS) else "no ending of a volume"


def _is_series(folder: Path) -> bool:
    slices = [item for item in folder.iterdir() if item.suffix.lower() in DICOM or item.suffix[1:].isdigit()]
    return bool(slices) and bool(series_ids(folder))


def _without_channel(name: str, entry: Path, names: set[str]) -> str:
    number = re.search(r"_(\d{4})$", name)
    if number is None:
        return name
    base = name[: number.start()]
    ending = ending_of(entry)
    if number[1] != "0000" and f"{base}_0000{ending}".lower() in names:
        raise DataError(
            f"{entry.name} in {entry.parent} is a further channel of {base}; volumes of one channel are read. Keep _0000 "
            "alone, or build the list of cases yourself"
        )
    return base if number[1] == "0000" else name
