"""Parameter-efficient transfer learning for medical images, native to MONAI.

A frozen backbone plus a small trained delta: attach it, train it, save it in one small file, load it, combine it.
"""

import sys
from importlib import import_module

from monai_petl import inflation, losses, methods, networks
from monai_petl.core.adapt import adapt, trainable_parameters
from monai_petl.core.adapters import (
    AdapterFileError,
    adapter_state_dict,
    backbone_state_dict,
    inspect_adapter,
    load_adapter,
    save_adapter,
)
from monai_petl.core.method import Method
from monai_petl.core.summary import Summary, summary
from monai_petl.core.switching import activate, disabled, merge, merge_and_unload, remove_adapter, unmerge
from monai_petl.weights.backbone import identify, load_backbone

__version__ = "0.1.0"

FORMER = {"deltas": "core.deltas", "summary": "core.summary", "methods.targets": "core.roles"}
for _name, _now in FORMER.items():  # modules that scripts import by the names that they had
    sys.modules[f"monai_petl.{_name}"] = import_module(f"monai_petl.{_now}")

__all__ = [
    "AdapterFileError",
    "Method",
    "Summary",
    "activate",
    "adapt",
    "adapter_state_dict",
    "backbone_state_dict",
    "disabled",
    "identify",
    "inflation",
    "inspect_adapter",
    "load_adapter",
    "load_backbone",
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
