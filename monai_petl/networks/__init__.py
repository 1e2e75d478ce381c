"""Networks with a shape of their own."""

from monai_petl.networks.punet import PUNET_CONFIGURATIONS, PUNet, PUNetOutput

__all__ = ["PUNET_CONFIGURATIONS", "PUNet", "PUNetOutput"]
