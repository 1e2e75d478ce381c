"""Networks with a shape of their own."""

from monai_petl.networks.aim import AIMSwin, AIMViT
from monai_petl.networks.fpt import FPT, FPT_VARIANTS
from monai_petl.networks.punet import PUNET_CONFIGURATIONS, PUNet, PUNetOutput
from monai_petl.networks.punet_weights import load_punet, load_punet_backbone
from monai_petl.networks.san import SAN, SAN_WIDTHS
from monai_petl.networks.slices import Slices, slices_of
from monai_petl.networks.state_files import save_network
from monai_petl.networks.swin_weights import load_swin_unetr
from monai_petl.networks.trained_weights import load_trained
from monai_petl.networks.vit_classifier import ViTClassifier
from monai_petl.networks.vit_segmenter import DECODERS, LinearDecoder, TapDecoder, ViTSegmenter
from monai_petl.networks.vit_weights import load_backbone, vit_backbone

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
