"""What a bundle is told about intensities and voxel sizes, where a wrong value would train on nonsense without a word."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["check_intensities"]

NORMALISATIONS = ("window", "percentile", "zscore")


def check_intensities(normalisation: str, intensity_window: Sequence[float], spacing: Sequence[float]) -> None:
    """Stop before anything is built when volumes could not be normalised or resampled as a config says.

    Args:
        normalisation: ``"window"``, ``"percentile"`` or ``"zscore"``; another word would leave intensities as they are.
        intensity_window: black and white, in the unit of the images (HU for CT).
        spacing: voxel size that volumes are resampled to, in mm.

    Raises:
        ValueError: says which value, and what is expected.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation must be one of {', '.join(NORMALISATIONS)}; got {normalisation!r}")
    window = list(intensity_window)
    if len(window) != 2 or not all(_is_number(value) for value in window) or not window[0] < window[1]:
        raise ValueError(
            f"intensity_window must be two numbers, the lower one first, such as [-175, 250]; got {window}"
        )
    sizes = list(spacing) if isinstance(spacing, Sequence) else [spacing]
    if not all(_is_number(size) and size > 0 for size in sizes):
        raise ValueError(f"spacing must be positive numbers of mm; got {sizes}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
