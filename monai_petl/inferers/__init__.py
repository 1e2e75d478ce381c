"""Inferers that MONAI has not got."""

from monai_petl.inferers.center_slice import CenterSliceInferer

__all__ = ["CenterSliceInferer"]
