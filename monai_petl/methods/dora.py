"""DoRA: low-rank factors for the directions of a layer's rows, and their lengths besides.

S.-Y. Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353 (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

from monai_petl.methods.lora import LoRA

__all__ = ["DoRA"]


@dataclass(frozen=True)
class DoRA(LoRA):
    """As :class:`LoRA`, with a trained length for each row of an adapted weight.

    W' = m (W + g B A) / |W + g B A|, row by row, where m starts at \\|W\\| (equation 5), so that the start is the backbone.
    ``LoRA(dora=True)`` is the same by the name that it had first.

    Args:
        As :class:`LoRA`, without ``dora``.

    Raises:
        ValueError: ``dora=False``, which is :class:`LoRA`.
    """

    dora: bool = True

    def __post_init__(self) -> None:
        if not self.dora:
            raise ValueError("DoRA trains the lengths of rows; use LoRA, with the same options, for factors alone")
