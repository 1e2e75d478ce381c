"""Networks with a shape of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from monai_petl.networks.fpt.network import FPT, FPT_VARIANTS
from monai_petl.networks.punet.network import PUNET_CONFIGURATIONS, PUNet, PUNetOutput
from monai_petl.networks.san.network import SAN, SAN_WIDTHS
from monai_petl.networks.vit.aim import AIMSwin, AIMViT
from monai_petl.networks.vit.backbone import vit_backbone
from monai_petl.networks.vit.classifier import ViTClassifier
from monai_petl.networks.vit.segmenter import DECODERS, LinearDecoder, TapDecoder, ViTSegmenter
from monai_petl.networks.vit.slices import Slices, slices_of

if TYPE_CHECKING:
    from monai_petl.weights import (
        load_backbone,
        load_punet,
        load_punet_backbone,
        load_swin_unetr,
        load_trained,
        save_network,
    )

__all__ = [
    "DECODERS",
    "FPT",
    "FPT_VARIANTS",
    "PUNET_CONFIGURATIONS",
    "SAN",
    "SAN_WIDTHS",
    "AIMSwin",
    "AIMViT",
    "LinearDecoder",
    "PUNet",
    "PUNetOutput",
    "Slices",
    "TapDecoder",
    "ViTClassifier",
    "ViTSegmenter",
    "load_backbone",
    "load_punet",
    "load_punet_backbone",
    "load_swin_unetr",
    "load_trained",
    "save_network",
    "slices_of",
    "vit_backbone",
]


def __getattr__(name: str) -> Any:
    """What loads networks lies in :mod:`monai_petl.weights`, above the networks, and has its public name here."""
    if name in __all__:
        from monai_petl import weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
