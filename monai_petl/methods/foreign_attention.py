"""Attention of other libraries: found so that no default is guessed for a network that has it.

timm, Hugging Face, torchvision and Segment Anything write attention in classes of their own. What LoRA takes by default, q and
v of MONAI's attention or all convolutions, would leave theirs out without a word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from monai.networks.blocks.crossattention import CrossAttentionBlock
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets.swin_unetr import WindowAttention
from torch import nn

from monai_petl.methods.targets import CONVOLUTIONS, backbone_modules

__all__ = ["collapsed", "foreign_attention", "require_known_attention"]

KNOWN = (SABlock, WindowAttention, CrossAttentionBlock)
PROJECTIONS = re.compile(
    r"(^|_)(qkv|kv|[qkv]|query|key|value|queries|keys|values|to_(q|k|v|qkv|kv)|in_proj|query_key_value|c_attn"
    r"|[qkv]_?(proj|lin|linear)|w[qkv]|qkv_proj)$"
)
SCALED = ("scaled_dot_product_attention", "multi_head_attention_forward", "softmax")


def foreign_attention(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of the backbone that compute attention and are not MONAI's, the innermost of each, in order."""
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in backbone_modules(network):
        if isinstance(module, KNOWN):
            inside += (f"{name}." if name else "",)
        elif not (inside and f"{name}.".startswith(inside)) and _is_attention(module):
            found.append((name, module))
    return found


def require_known_attention(network: nn.Module) -> None:
    """Refuse to choose layers in a network with attention of another library.

    Raises:
        ValueError: lists the layers that could be taken.
    """
    found = foreign_attention(network)
    if not found:
        return
    place, module = found[0]
    layers = [
        name
        for name, layer in backbone_modules(network)
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)) and not _in_torchs_own(network, name)
    ]
    raise ValueError(
        f"this {type(network).__name__} has attention of another library ({type(module).__name__}, {len(found)} times, first "
        f"{place or 'itself'}), so no layers are chosen for you; give targets, patterns of the layers to adapt. It could take: "
        f"{collapsed(layers)}"
    )


def collapsed(names: Iterable[str]) -> str:
    """Names with ``*`` for numbers and how many there are of each: ``blocks.*.attn.qkv (12)``."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _is_attention(module: Any) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    own = [name for name, child in module.named_children() if isinstance(child, (nn.Linear, *CONVOLUTIONS))]
    if not own:
        return False
    projects = sum(bool(PROJECTIONS.search(name)) for name in own)
    named = re.search("attention|attn", type(module).__name__, re.IGNORECASE)
    return projects > 0 and bool(named or projects > 1 or "qkv" in own or _scales(type(module)))


def _scales(kind: Any) -> bool:
    functions = [getattr(member, "__code__", None) for base in kind.__mro__ for member in vars(base).values()]
    return any(code is not None and set(SCALED) & {*code.co_names} for code in functions)


def _in_torchs_own(network: nn.Module, name: str) -> bool:
    """Whether a layer is the output of torch's attention, which reads its weight and never calls it."""
    return isinstance(network.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
