"""Put on the path of the server's Python: lets torchvision be imported where its compiled part does not fit the build of torch.

Package indexes may have a CPU build of torch and a CUDA build of torchvision only. The server imports torchvision for its
Python parts; that fails at the first operators of the compiled part, which nothing here calls. Naming them is enough.
"""

import sys

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
