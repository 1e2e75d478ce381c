"""Work with bundle folders."""

from monai_petl.bundle.config import choose, network_of_config, root_cause
from monai_petl.bundle.folder import BundleFolder, items_of

__all__ = ["BundleFolder", "choose", "items_of", "network_of_config", "root_cause"]
