"""Losses that MONAI has not got."""

from __future__ import annotations

from monai_petl.losses.cpa import CPALoss
from monai_petl.losses.focal import SampleWeightedFocalLoss
from monai_petl.losses.matched_masks import MatchedMaskLoss

__all__ = ["CPALoss", "MatchedMaskLoss", "SampleWeightedFocalLoss"]
