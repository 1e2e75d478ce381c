"""Parameter-efficient transfer learning for medical images, native to MONAI.

A frozen backbone plus a small trained delta: attach it, train it, save it in one small file, load it, combine it.
"""

from monai_petl import inflation, losses, methods, networks
from monai_petl.adapt import Method, adapt, trainable_parameters
from monai_petl.adapters import (
    AdapterFileError,
    adapter_state_dict,
    backbone_state_dict,
    inspect_adapter,
    load_adapter,
    save_adapter,
)
from monai_petl.summary import Summary, summary
from monai_petl.switching import activate, disabled, merge, merge_and_unload, remove_adapter, unmerge

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "Method",
    "Summary",
    "activate",
    "adapt",
    "adapter_state_dict",
    "backbone_state_dict",
    "disabled",
    "inflation",
    "inspect_adapter",
    "load_adapter",
    "losses",
    "merge",
    "merge_and_unload",
    "methods",
    "networks",
    "remove_adapter",
    "save_adapter",
    "summary",
    "trainable_parameters",
    "unmerge",
]
