"""Networks with a shape of their own."""

from monai_petl.networks.punet import PUNET_CONFIGURATIONS, PUNet, PUNetOutput
from monai_petl.networks.punet_weights import load_punet, load_punet_backbone
from monai_petl.networks.segmenter_weights import load_backbone, load_segmenter, vit_backbone
from monai_petl.networks.vit_segmenter import TapDecoder, ViTSegmenter

__all__ = [
    "PUNET_CONFIGURATIONS",
    "PUNet",
    "PUNetOutput",
    "TapDecoder",
    "ViTSegmenter",
    "load_backbone",
    "load_punet",
    "load_punet_backbone",
    "load_segmenter",
    "vit_backbone",
]
