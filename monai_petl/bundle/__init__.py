"""Work with bundle folders."""

from monai_petl.bundle.config import choose, network_of_config, root_cause

__all__ = ["choose", "network_of_config", "root_cause"]
