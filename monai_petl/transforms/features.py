"""Stored features of a frozen network, beside the image that they were computed from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from monai_petl.data.feature_cache import FeatureCache

__all__ = ["LoadFeaturesd"]


class LoadFeaturesd(MapTransform):
    """Add what a cache holds of an image file to its case, under the names that it was stored by.

    It reads the path, so it comes before the image is loaded. In a ``CacheDataset`` the features are kept in memory where the
    image is.

    Args:
        keys: of the image's path.
        cache: see :class:`monai_petl.data.FeatureCache`.

    Raises:
        FileNotFoundError: there are no features of the image.
    """

    def __init__(self, keys: KeysCollection, cache: FeatureCache, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.cache = cache

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = dict(data)
        for key in self.key_iterator(found):
            found.update(self.cache.read(found[key]))
        return found
