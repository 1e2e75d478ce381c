"""Label maps by class name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

__all__ = ["SelectClassesd"]


class SelectClassesd(MapTransform):
    """Renumber a label map: the k-th of ``classes`` becomes k (from 1), everything else background (0).

    ``monai.transforms.MapLabelValued`` keeps what it is not told about; here all other classes merge into background.

    Args:
        keys: label maps (1, H, W, D) of class ids.
        label_ids: class name -> id in the label map.
        classes: the classes to keep, in order.
        allow_missing_keys: skip keys that a sample has not got.

    Raises:
        KeyError: (when called) a class is not among ``label_ids``.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_ids: Mapping[str, int],
        classes: Sequence[str],
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_ids = dict(label_ids)
        self.classes = list(classes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            label = result[key]
            selected = torch.zeros_like(label, dtype=torch.uint8)
            for index, name in enumerate(self.classes, 1):
                if name not in self.label_ids:
                    known = ", ".join(self.label_ids) or "none"
                    raise KeyError(f"unknown class {name!r}; the data set's classes are: {known}")
                selected[label == self.label_ids[name]] = index
            result[key] = selected
        return result
