"""Methods that change a network from within."""

from monai_petl.core.roles import PRESETS, ROLES
from monai_petl.methods.aim import AIM
from monai_petl.methods.bottleneck import BottleneckAdapters
from monai_petl.methods.class_head import ClassHead
from monai_petl.methods.dora import DoRA
from monai_petl.methods.ept import EPT, EPT_FORMS, attention_gates, collapse_prompts
from monai_petl.methods.ffn_adapter import FFNAdapter
from monai_petl.methods.lora import LoRA
from monai_petl.methods.parts.by_name import METHODS, adapt_by_name, method_by_name, parameter_groups
from monai_petl.methods.parts.peft_files import export_peft, import_peft
from monai_petl.methods.parts.punet_methods import PUNET_METHODS, PUNetMethod, adapt_punet, punet_method
from monai_petl.methods.prompt_tuning import PromptTuning, export_class
from monai_petl.methods.ssf import SSF
from monai_petl.methods.subsets import BiasOnly, FullFineTuning, HeadOnly, LastBlocks, NormOnly
from monai_petl.methods.vpetl import VPETL
from monai_petl.methods.vpt import VPT

__all__ = [
    "AIM",
    "EPT",
    "EPT_FORMS",
    "METHODS",
    "PRESETS",
    "PUNET_METHODS",
    "ROLES",
    "SSF",
    "VPETL",
    "VPT",
    "BiasOnly",
    "BottleneckAdapters",
    "ClassHead",
    "DoRA",
    "FFNAdapter",
    "FullFineTuning",
    "HeadOnly",
    "LastBlocks",
    "LoRA",
    "NormOnly",
    "PUNetMethod",
    "PromptTuning",
    "adapt_by_name",
    "adapt_punet",
    "attention_gates",
    "collapse_prompts",
    "export_class",
    "export_peft",
    "import_peft",
    "method_by_name",
    "parameter_groups",
    "punet_method",
]
