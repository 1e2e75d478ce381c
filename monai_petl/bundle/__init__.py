"""Work with bundle folders."""

from monai_petl.bundle.config import choose, network_of_config

__all__ = ["choose", "network_of_config"]
