"""Resampling that leaves alone what is not an image, for programs that keep paths beside the images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import Spacingd

__all__ = ["GuardedSpacingd"]


class GuardedSpacingd(Spacingd):
    """``Spacingd`` for dictionaries whose entries beside the image need not be metadata.

    From 1.6 on, MONAI's own copies the metadata of an image ``image`` from a NIfTI file into every entry whose key begins with
    ``image_``. MONAI Label keeps the file's path as ``image_path`` there, and inference fails. This one puts such
    entries aside for the call. Otherwise it is ``Spacingd``, its inverse too.

    Args:
        As ``Spacingd``: ``pixdim`` in mm.
    """

    def __call__(self, data: Mapping[Hashable, Any], *args: Any, **kwargs: Any) -> dict[Hashable, Any]:
        beside = {key: value for key, value in data.items() if self._looks_like_metadata(key) and not _updates(value)}
        done = super().__call__({key: value for key, value in data.items() if key not in beside}, *args, **kwargs)
        return {**done, **beside}

    def _looks_like_metadata(self, key: Hashable) -> bool:
        return isinstance(key, str) and key not in self.keys and key.startswith(tuple(f"{own}_" for own in self.keys))


def _updates(value: Any) -> bool:
    return hasattr(value, "update")
