"""Ignite handlers that MONAI has not got."""

from monai_petl.handlers.adapter_saver import AdapterSaver
from monai_petl.handlers.clip import GradientClipping

__all__ = ["AdapterSaver", "GradientClipping"]
