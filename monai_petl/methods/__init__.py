"""Methods that change a network from within."""

from monai_petl.methods.bottleneck import BottleneckAdapters
from monai_petl.methods.class_head import ClassHead
from monai_petl.methods.prompt_tuning import PromptTuning, export_class
from monai_petl.methods.punet_variants import PUNET_VARIANTS, PUNetVariant, adapt_punet, punet_variant
from monai_petl.methods.segmenter_variants import SEGMENTER_VARIANTS, adapt_segmenter

__all__ = [
    "PUNET_VARIANTS",
    "SEGMENTER_VARIANTS",
    "BottleneckAdapters",
    "ClassHead",
    "PUNetVariant",
    "PromptTuning",
    "adapt_punet",
    "adapt_segmenter",
    "export_class",
    "punet_variant",
]
