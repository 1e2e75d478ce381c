"""A file becomes a network: published checkpoints, 2D ones inflated, whole networks of bundles."""

from monai_petl.weights.account import Account, Entry
from monai_petl.weights.backbone import convert_backbone, identify, published
from monai_petl.weights.family import Family, Published
from monai_petl.weights.punet import load_punet, load_punet_backbone
from monai_petl.weights.resnet3d_files import ResNet3DFiles
from monai_petl.weights.segresnet_files import SegResEncoderFiles, SegResNetDSFiles, SegResNetFiles
from monai_petl.weights.state_files import save_network
from monai_petl.weights.swin_unetr import load_swin_unetr
from monai_petl.weights.swin_unetr_files import SwinUNETRFiles
from monai_petl.weights.trained import load_trained
from monai_petl.weights.vista3d_files import VISTA3DFiles
from monai_petl.weights.vit import load_backbone

__all__ = [
    "Account",
    "Entry",
    "Family",
    "Published",
    "ResNet3DFiles",
    "SegResEncoderFiles",
    "SegResNetDSFiles",
    "SegResNetFiles",
    "SwinUNETRFiles",
    "VISTA3DFiles",
    "convert_backbone",
    "identify",
    "load_backbone",
    "load_punet",
    "load_punet_backbone",
    "load_swin_unetr",
    "load_trained",
    "published",
    "save_network",
]
