"""Work with bundle folders."""

from monai_petl.bundle.config import choose, is_terminal, network_of_config
from monai_petl.bundle.errors import root_cause, say_errors_last, sentence_of
from monai_petl.bundle.folder import BundleFolder, items_of
from monai_petl.bundle.intensities import check_intensities
from monai_petl.bundle.overrides import check_overrides

__all__ = [
    "BundleFolder",
    "check_intensities",
    "check_overrides",
    "choose",
    "is_terminal",
    "items_of",
    "network_of_config",
    "root_cause",
    "say_errors_last",
    "sentence_of",
]
