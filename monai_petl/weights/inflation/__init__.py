"""2D pre-trained weights in MONAI networks, 2D or 3D."""

from monai_petl.networks.vit.attention_bias import ClassKeyBias, RelativePositionBias
from monai_petl.weights.inflation.architecture import (
    Architecture,
    ResNetArchitecture,
    SwinArchitecture,
    ViTArchitecture,
)
from monai_petl.weights.inflation.build import (
    build_from_pretrained,
    resnet_from_pretrained,
    swin_from_pretrained,
    vit_from_pretrained,
)
from monai_petl.weights.inflation.convert import Converted, convert_state_dict
from monai_petl.weights.inflation.files import load_inflated, read_checkpoint, save_inflated
from monai_petl.weights.inflation.inflate import Inflated, inflate_state_dict
from monai_petl.weights.inflation.load import convert_checkpoint, load_pretrained
from monai_petl.weights.inflation.report import InexactInflationWarning, Report
from monai_petl.weights.inflation.tensor_rules import (
    adapt_in_channels,
    fold_normalization,
    inflate_kernel,
    inflate_merging_norm,
    inflate_merging_reduction,
    inflate_rel_bias,
    inflate_transposed_kernel,
    resize_kernel,
    resize_pos_embed,
    resize_rel_bias,
)

__all__ = [
    "Architecture",
    "ClassKeyBias",
    "Converted",
    "InexactInflationWarning",
    "Inflated",
    "RelativePositionBias",
    "Report",
    "ResNetArchitecture",
    "SwinArchitecture",
    "ViTArchitecture",
    "adapt_in_channels",
    "build_from_pretrained",
    "convert_checkpoint",
    "convert_state_dict",
    "fold_normalization",
    "inflate_kernel",
    "inflate_merging_norm",
    "inflate_merging_reduction",
    "inflate_rel_bias",
    "inflate_state_dict",
    "inflate_transposed_kernel",
    "load_inflated",
    "load_pretrained",
    "read_checkpoint",
    "resize_kernel",
    "resize_pos_embed",
    "resize_rel_bias",
    "resnet_from_pretrained",
    "save_inflated",
    "swin_from_pretrained",
    "vit_from_pretrained",
]
