"""Label maps as they are read: whole numbers that the data set has a class for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from monai_petl.data.errors import DataError
from monai_petl.data.volumes import MOST_FRACTION

__all__ = ["WholeLabelsd"]


class WholeLabelsd(MapTransform):
    """Round label values within 0.001 of a whole number, and refuse those that no class has.

    Place it right after loading, before anything cuts 1.9999998 down to 1. Scaled, registered and resampled labels hold such
    values.

    Args:
        keys: label maps of any shape.
        label_ids: class name -> value in the label map; background (0) need not be among them. ``None`` takes any value.
        allow_missing_keys: skip keys that a sample does not have.

    Raises:
        DataError: (when called) naming the file and the value: further from a whole number, NaN, or without a class.
    """

    def __init__(
        self, keys: KeysCollection, label_ids: Mapping[str, int] | None = None, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_ids = None if label_ids is None else dict(label_ids)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            label = torch.as_tensor(result[key])
            name = getattr(label, "meta", {}).get("filename_or_obj", key)
            if label.is_floating_point():
                rounded = label.round()
                apart = ~((label - rounded).abs() <= MOST_FRACTION)  # NaN is among them
                if apart.any():
                    first = float(label[apart].flatten()[0])
                    raise DataError(
                        f"{name} holds {int(apart.sum())} label values that are not whole numbers, such as {first:.7g}. "
                        "Resample labels with nearest neighbours"
                    )
                label = result[key] = rounded
            if self.label_ids:
                self._require_classes(label, name)
        return result

    def _require_classes(self, label: torch.Tensor, name: object) -> None:
        known = {0, *(self.label_ids or {}).values()}
        highest, lowest = int(label.max()), int(label.min())
        if lowest >= 0 and known >= set(range(highest + 1)):  # the usual case, without a sort
            return
        for value in torch.unique(label.as_subclass(torch.Tensor)).tolist():
            if value not in known:
                table = ", ".join(f"{number} {word}" for word, number in (self.label_ids or {}).items())
                raise DataError(
                    f"{name} holds the label value {value:g}, which no class of the data set has; it has 0 background, "
                    f"{table}. Correct the label, or name the class in dataset.json"
                )
