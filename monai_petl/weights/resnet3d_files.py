"""Checkpoints of 3D ResNets: Merlin, FMCIB, MedicalNet, in MONAI's ``ResNet``.

L. Blankemeier et al., Merlin, arXiv:2406.06512 (2024); S. Pai et al., FMCIB, Nature Machine Intelligence 6 (2024);
S. Chen et al., Med3D, arXiv:1904.00625 (2019).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from monai.networks.nets import ResNet
from torch import Tensor, nn

from monai_petl.weights.family import Family, Published, blocks_of

__all__ = ["ResNet3DFiles"]

OWN = re.compile(r"(conv1|bn1|fc|layer[1-4]\.\d+\.(conv[1-3]|bn[1-3]|downsample\.[01]))\.")
FIRST, MARK = "conv1.weight", "layer1.0.conv1.weight"


class ResNet3DFiles(Family):
    """Layers, widths, kind of block and shortcut follow from the tensors.

    Merlin moves the last axis of its input to the front and repeats the channel three times. Here the kernels' axes are moved
    instead, and the first kernel is summed over its channels: the network takes (B, 1, H, W, D) and gives the same features.
    """

    title = "3D ResNet"
    inputs = (FIRST,)
    head = ("fc.",)
    published = (
        Published("Merlin", "15,331 abdominal CT with reports", "MIT", "github.com/StanfordMIMI/Merlin"),
        Published("FMCIB", "11,467 lesions in CT", "MIT", "github.com/AIM-Harvard/foundation-cancer-image-biomarker"),
        Published("MedicalNet", "23 sets of CT and MR", "MIT", "github.com/Tencent/MedicalNet"),
    )
    reasons: ClassVar[dict[str, str]] = {
        r"encode_text\.": "text tower",
        r"logit_scale|temperature": "temperature of the contrastive training",
        r"(classifier|contrastive_head|heads?)\.": "head of the pre-training",
        r"conv_seg\.": "segmentation head of the pre-training",
    }

    def __init__(self) -> None:
        self.merlin = self.dilated = False

    def names(self, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
        ends = [n[: -len(MARK)] for n in tensors if n == MARK or n.endswith(f".{MARK}")]
        prefix = next((p for p in ends if p + FIRST in tensors and tensors[p + FIRST].ndim == 5), None)
        if prefix is None:
            return None
        self.merlin = tuple(tensors[prefix + FIRST].shape[1:]) == (3, 3, 7, 7)
        self.dilated = prefix == "module." and not self.merlin
        found = {n: n[len(prefix) :] for n in tensors if n.startswith(prefix)}
        return {n: plain for n, plain in found.items() if OWN.match(plain)}

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        if not self.merlin or tensor.ndim != 5:
            return tensor
        moved = tensor.permute(0, 1, 3, 4, 2).contiguous()
        return moved.sum(1, keepdim=True) if name == FIRST else moved

    def arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        first = tensors[FIRST]
        told: dict[str, Any] = {
            "block": "bottleneck" if "layer1.0.conv3.weight" in tensors else "basic",
            "layers": blocks_of(tensors, r"layer(\d)\.(\d+)\."),
            "block_inplanes": [tensors[f"layer{i}.0.bn1.weight"].shape[0] for i in range(1, 5)],
            "spatial_dims": 3,
            "n_input_channels": first.shape[1],
            "conv1_t_size": tuple(first.shape[2:]),
            "shortcut_type": "B" if any(".downsample." in n for n in tensors) else "A",
            "bias_downsample": any(n.endswith("downsample.0.bias") for n in tensors),
            "feed_forward": "fc.weight" in tensors,
        }
        if self.merlin:
            told["conv1_t_stride"] = (2, 2, 1)
        elif not told["feed_forward"]:  # all published ones
            told["conv1_t_stride"] = 2
        if told["feed_forward"]:
            told["num_classes"] = tensors["fc.weight"].shape[0]
        return told

    def build(self, **arguments: Any) -> nn.Module:
        if "conv1_t_stride" not in arguments:
            raise TypeError("give conv1_t_stride, the step of the first convolution, which tensors do not tell")
        options = dict(arguments)
        options["n_input_channels"] = options.pop("in_channels", options["n_input_channels"])
        if "out_channels" in options:
            options |= {"num_classes": options.pop("out_channels"), "feed_forward": True}
        return ResNet(**options)

    def anew(self, missing: Sequence[str]) -> dict[str, str]:
        head = all(name.startswith(self.head) for name in missing)
        return dict.fromkeys(missing, "the file has no head for classes") if head else {}

    def note(self) -> str:
        if self.merlin:
            return "takes (B, 1, H, W, D): the kernels' axes are moved in place of the image's"
        if self.dilated:
            return (
                "MedicalNet dilates layer3 and layer4 where MONAI's ResNet has steps of 2: features agree up to layer2, and "
                "behind it they are coarser"
            )
        return ""
