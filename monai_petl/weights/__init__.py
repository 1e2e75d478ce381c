"""A file becomes a network: 2D checkpoints, self-supervised ones, whole networks of bundles."""

from monai_petl.weights.punet import load_punet, load_punet_backbone
from monai_petl.weights.state_files import save_network
from monai_petl.weights.swin_unetr import load_swin_unetr
from monai_petl.weights.trained import load_trained
from monai_petl.weights.vit import load_backbone

__all__ = ["load_backbone", "load_punet", "load_punet_backbone", "load_swin_unetr", "load_trained", "save_network"]
