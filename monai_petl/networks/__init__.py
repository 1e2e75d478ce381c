"""Networks with a shape of their own."""

from monai_petl.networks.punet import PUNET_CONFIGURATIONS, PUNet, PUNetOutput
from monai_petl.networks.punet_weights import load_punet, load_punet_backbone

__all__ = ["PUNET_CONFIGURATIONS", "PUNet", "PUNetOutput", "load_punet", "load_punet_backbone"]
