"""One of MONAI's three ways of scaling the intensities of volumes, by name."""

from __future__ import annotations

from collections.abc import Sequence

from monai.config import KeysCollection
from monai.transforms import (
    MapTransform,
    NormalizeIntensityd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
)

__all__ = ["scale_intensity"]

NORMALISATIONS = ("window", "percentile", "zscore")


def scale_intensity(keys: KeysCollection, normalisation: str, intensity_window: Sequence[float]) -> MapTransform:
    """The transform of this name.

    Args:
        keys: of the images.
        normalisation: ``"window"`` takes the window to [-1, 1] and clips, ``"percentile"`` does so with the 0.5th and 99.5th
            percentile of each image, ``"zscore"`` takes each image to mean 0 and deviation 1.
        intensity_window: black and white, in the unit of the images (HU for CT); only ``"window"`` reads it.

    Raises:
        ValueError: there is no such way; says which there are.
    """
    if normalisation == "window":
        return ScaleIntensityRanged(keys, *intensity_window, b_min=-1.0, b_max=1.0, clip=True)
    if normalisation == "percentile":
        return ScaleIntensityRangePercentilesd(keys, lower=0.5, upper=99.5, b_min=-1.0, b_max=1.0, clip=True)
    if normalisation == "zscore":
        return NormalizeIntensityd(keys)
    raise ValueError(f"normalisation must be one of {', '.join(NORMALISATIONS)}; got {normalisation!r}")
