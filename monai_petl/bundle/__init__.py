"""Work with bundle folders."""

from monai_petl.bundle.config import network_of_config

__all__ = ["network_of_config"]
