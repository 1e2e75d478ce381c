"""One class a sample: the label of many classes reduced to a randomly drawn one, for networks that are prompted by name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import MapTransform, Randomizable

__all__ = ["SampleClassLabeld"]


class SampleClassLabeld(Randomizable, MapTransform):
    """Draws one class, each with equal frequency, and reduces the label to it: 1 where the label is that class, else 0.

    Args:
        keys: labels (1, H, W, D) of class ids.
        classes: class name -> id in the label.
        class_key: where the name of the drawn class goes.
        allow_missing_keys: skip keys that a sample has not got.

    Raises:
        ValueError: there is no class.

    Example::

        SampleClassLabeld("label", {"spleen": 1, "liver": 5})
    """

    def __init__(
        self,
        keys: Hashable | Sequence[Hashable],
        classes: Mapping[str, int],
        class_key: Hashable = "class_name",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not classes:
            raise ValueError("classes must map at least one class name to its id in the label, got none")
        self.classes = list(classes.items())
        self.class_key = class_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        name, class_id = self.classes[self.R.randint(len(self.classes))]
        result = {**data, self.class_key: name}
        for key in self.key_iterator(result):
            result[key] = (result[key] == class_id).to(torch.uint8)
        return result
