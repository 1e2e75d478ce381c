"""The reader of pictures for MONAI's ``LoadImage``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.data import ImageReader
from monai.utils import ensure_tuple

from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.pictures import is_image, is_picture, read_picture

__all__ = ["PictureReader"]


class PictureReader(ImageReader):
    """Reads a picture as a person sees it, (H, W) or (H, W, 3) with rows first, from 0 to 255.

    See :mod:`monai_petl.data.pictures` for the rule of each mode, and :mod:`monai_petl.data.dicom_picture` for radiographs. For
    8-bit grey and colours it gives what ``PILReader(reverse_indexing=False)`` gives.

    Example, in a bundle's config::

        {"_target_": "LoadImaged", "keys": "image", "reader": {"_target_": "monai_petl.data.PictureReader"}, "image_only": true}

    Raises:
        DataError: a file is missing, damaged, or says not what is black and white; names it.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether the names are those of images."""
        return all(is_image(name) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[str]:
        """The files to read; :meth:`get_data` opens them, since ``LoadImage`` hides errors that are raised here."""
        return [os.fspath(name) for name in ensure_tuple(data)]

    def get_data(self, img: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Pixels and metadata of the first file."""
        name = img[0]
        try:
            pixels = read_picture(name)
        except DataError as error:
            raise DataError(f"{name} {error}") from None
        channels = pixels.ndim == 3 and is_picture(name)
        meta = {"spatial_shape": np.array(pixels.shape[:2] if channels else pixels.shape)}
        return pixels, {**meta, "original_channel_dim": -1 if channels else float("nan")}
