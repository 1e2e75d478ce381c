"""The reader of volumes for MONAI's ``LoadImage``: every format, one rule for the geometry, refusals with the file's name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from monai.data import NibabelReader
from monai.utils import ensure_tuple

from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.folders import ending_of
from monai_petl.data.volume_files import BROKEN, open_volume, unreadable

__all__ = ["VolumeReader"]


class VolumeReader(NibabelReader):
    """Reads NIfTI, MGH, NRRD, MetaImage and folders of a DICOM series, with the metadata of MONAI's ``NibabelReader``.

    An image has three axes (H, W, D) and an affine to mm in RAS, whatever the format; see
    :func:`monai_petl.data.volume_files.open_volume` for what is refused, and :mod:`monai_petl.data.geometry` for the rule.

    Example, in a bundle's config::

        {"_target_": "LoadImaged", "keys": "image", "reader": "monai_petl.data.VolumeReader", "image_only": true}

    Raises:
        DataError: a file is missing, damaged, or no volume; names it.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether the names are those of volumes or of folders."""
        return all(bool(ending_of(name)) or os.path.isdir(name) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        """The files to read; :meth:`get_data` opens them, since ``LoadImage`` hides errors that are raised here."""
        return [_File(os.fspath(name)) for name in ensure_tuple(data)]

    def get_data(self, img: Any) -> tuple[Any, dict]:
        """Voxels and metadata, as :meth:`NibabelReader.get_data` gives them."""
        files = ensure_tuple(img)
        name = files[0].name if isinstance(files[0], _File) else "the image"
        try:
            opened = [open_volume(item.name) if isinstance(item, _File) else item for item in files]
            self.filenames = [item.name if isinstance(item, _File) else name for item in files]
            return super().get_data(opened if len(opened) > 1 else opened[0])
        except DataError as error:
            raise DataError(f"{name} {error}") from None
        except BROKEN as error:
            raise DataError(f"{name} {unreadable(error)}") from None


class _File:
    """A file that is opened later."""

    def __init__(self, name: str) -> None:
        self.name = name
