"""Checkpoints of ``SegResNet`` (SuPreM, bundles), ``SegResNetDS`` and ``SegResEncoder`` (CT-FM).

S. Pai et al., Vision Foundation Models for Computed Tomography, arXiv:2501.09001 (2025).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from monai.networks.nets import SegResNet, SegResNetDS
from monai.networks.nets.segresnet_ds import SegResEncoder
from torch import Tensor, nn

from monai_petl.weights.family import Family, Published, blocks_of

__all__ = ["SegResEncoderFiles", "SegResNetDSFiles", "SegResNetFiles"]

PRETEXT = {r"projection_head\.": "projection head of the pre-training"}


class SegResNetFiles(Family):
    """Whole networks, of any width; the upsampling follows from the tensors."""

    title = "SegResNet"
    inputs = ("convInit.conv.weight",)
    head = ("conv_final.2.",)
    published = (
        Published(
            "SuPreM",
            "2,100 CT, 25 organs",
            "CC BY-NC-ND 4.0: no commercial use, no derivatives",
            "github.com/MrGiovanni/SuPreM",
        ),
        Published(
            "wholeBody_ct_segmentation",
            "1,204 CT of TotalSegmentator, 104 classes",
            "Apache-2.0",
            "github.com/Project-MONAI/model-zoo",
        ),
    )

    def names(self, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
        prefix = _prefix(tensors, "convInit.conv.weight", "down_layers.0.1.conv1.conv.weight")
        return None if prefix is None else {name: name[len(prefix) :] for name in tensors if name.startswith(prefix)}

    def arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        first = tensors["convInit.conv.weight"]
        blocks = [n for n in tensors if re.match(r"down_layers\.\d+\.\d+\.conv1", n)]
        told: dict[str, Any] = {
            "spatial_dims": first.ndim - 2,
            "init_filters": first.shape[0],
            "in_channels": first.shape[1],
            "blocks_down": tuple(blocks_of(blocks, r"down_layers\.(\d+)\.(\d+)\.")),
            "blocks_up": tuple(blocks_of(tensors, r"up_layers\.(\d+)\.(\d+)\.")),
        }
        if any(re.match(r"up_samples\.\d+\.1\.deconv\.", name) for name in tensors):
            told["upsample_mode"] = "deconv"
        if "conv_final.2.conv.weight" in tensors:
            told["out_channels"] = tensors["conv_final.2.conv.weight"].shape[0]
        return told

    def build(self, **arguments: Any) -> nn.Module:
        if "out_channels" not in arguments:
            raise TypeError("give out_channels, the number of classes")
        return SegResNet(**arguments)

    def anew(self, missing: Sequence[str]) -> dict[str, str]:
        head = all(name.startswith(self.head) for name in missing)
        return dict.fromkeys(missing, "the file has no head for classes") if head else {}


class SegResNetDSFiles(Family):
    """Whole networks with deep supervision, and those that were trained to reconstruct, whose decoder starts anew."""

    title = "SegResNetDS"
    inputs = ("encoder.conv_init.weight",)
    head = ("up_layers.",)
    published = (Published("CT-FM, whole body", "CT of TotalSegmentator", "MIT", "github.com/project-lighter/CT-FM"),)
    reasons: ClassVar[dict[str, str]] = {
        **PRETEXT,
        r"up_layers\.": "decoder of the pre-training, which reconstructs images",
    }

    def names(self, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
        prefix = _prefix(tensors, "encoder.conv_init.weight", "encoder.layers.0.blocks.0.conv1.weight")
        if prefix is None or prefix.endswith("image_encoder.") or any(".up_layers_auto." in name for name in tensors):
            return None
        own = {name: name[len(prefix) :] for name in tensors if name.startswith(prefix)}
        heads = [tensors[name] for name, plain in own.items() if re.match(r"up_layers\.\d+\.head\.weight", plain)]
        reconstructs = bool(prefix) and all(head.shape[0] == 1 for head in heads)
        return {n: plain for n, plain in own.items() if not (reconstructs and plain.startswith("up_layers."))}

    def arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        heads = [n for n in tensors if re.match(r"up_layers\.\d+\.head\.weight", n)]
        told = _of_encoder({n.removeprefix("encoder."): t for n, t in tensors.items()})
        if heads:
            told |= {"out_channels": tensors[heads[-1]].shape[0], "dsdepth": len(heads)}
        return told

    def build(self, **arguments: Any) -> nn.Module:
        if "out_channels" not in arguments:
            raise TypeError("give out_channels, the number of classes")
        return SegResNetDS(**_with_norm(arguments))

    def anew(self, missing: Sequence[str]) -> dict[str, str]:
        decoder = all(name.startswith("up_layers.") for name in missing)
        return dict.fromkeys(missing, "the file has no decoder for classes") if decoder else {}


class SegResEncoderFiles(Family):
    """The encoder alone: a ``SegResEncoder``, or with ``out_channels`` a ``SegResNetDS`` whose decoder starts anew."""

    title = "SegResEncoder"
    inputs = ("conv_init.weight",)
    published = (Published("CT-FM", "148,000 CT", "MIT", "github.com/project-lighter/CT-FM"),)
    reasons: ClassVar[dict[str, str]] = PRETEXT

    def names(self, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
        prefix = _prefix(tensors, "conv_init.weight", "layers.0.blocks.0.conv1.weight")
        if prefix is None or prefix.endswith("encoder."):
            return None
        return {name: name[len(prefix) :] for name in tensors if name.startswith(prefix)}

    def arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return _of_encoder(tensors)

    def build(self, **arguments: Any) -> nn.Module:
        return SegResEncoder(**_with_norm(arguments))


def _prefix(tensors: Mapping[str, Tensor], *marks: str) -> str | None:
    """What stands before the names of a network that has these tensors."""
    ends = [name[: -len(marks[0])] for name in tensors if name == marks[0] or name.endswith("." + marks[0])]
    return next((prefix for prefix in ends if all(prefix + mark in tensors for mark in marks)), None)


def _of_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    first = tensors["conv_init.weight"]
    told: dict[str, Any] = {
        "spatial_dims": first.ndim - 2,
        "init_filters": first.shape[0],
        "in_channels": first.shape[1],
        "blocks_down": tuple(blocks_of(tensors, r"layers\.(\d+)\.blocks\.(\d+)\.")),
    }
    if "layers.0.blocks.0.norm1.running_mean" in tensors:
        told["norm"] = "batch"
    return told


def _with_norm(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if "norm" not in arguments:
        raise TypeError("give norm, 'instance' or 'group', whose tensors look alike")
    return dict(arguments)
