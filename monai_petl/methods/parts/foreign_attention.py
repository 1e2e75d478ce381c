"""Attention of other libraries: found so that no default is guessed for a network that has it.

timm, Hugging Face, torchvision and Segment Anything write attention in classes of their own. What LoRA takes by default, q and
v of MONAI's attention or all convolutions, would leave theirs out without a word. So would it in networks that work by linear
layers, such as MLP-Mixer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from monai.networks.blocks.crossattention import CrossAttentionBlock
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets.swin_unetr import WindowAttention
from torch import nn

from monai_petl.core.roles import CONVOLUTIONS, backbone_modules, has_attention

__all__ = [
    "collapsed",
    "foreign_attention",
    "layers_of_file",
    "require_known_attention",
    "require_known_blocks",
    "require_known_layers",
]

KNOWN = (SABlock, WindowAttention, CrossAttentionBlock)
PROJECTIONS = re.compile(
    r"(^|_)(qkvs?|kv|qk|[qkv]|query|key|value|queries|keys|values|to_(q|k|v|qkv|kv)|in_proj|query_key_value|c_attn|theta|phi"
    r"|(q|k|v|qkv|query|key|value)_?(proj|projection|lin|linear|conv|net)|w(q|k|v|qkv))$",
    re.IGNORECASE,
)
FUSED = ("scaled_dot_product_attention", "multi_head_attention_forward")
SCALED = (*FUSED, "softmax")
WRAPPED = 16  # layers inside a projection: one with its norm, or one a head; a whole encoder has more


def foreign_attention(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of the backbone that compute attention and are neither MONAI's nor of this package, in order."""
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in backbone_modules(network):
        if isinstance(module, KNOWN):
            inside += (f"{name}." if name else "",)
        elif not (inside and f"{name}.".startswith(inside)) and not _of(module, "monai_petl") and _is_attention(module):
            found.append((name, module))
    return found


def require_known_attention(network: nn.Module, remedy: str = "give targets, patterns of the layers to adapt") -> None:
    """Refuse to choose layers in a network with attention of another library.

    Raises:
        ValueError: lists the layers that could be taken.
    """
    found = foreign_attention(network)
    if found:
        place, module = found[0]
        raise ValueError(
            f"this {type(network).__name__} has attention of another library ({type(module).__name__}, {len(found)} times, "
            f"first {place or 'itself'}), so no layers are chosen for you; {remedy}. It could take: "
            f"{collapsed(_layers(network))}"
        )


def require_known_blocks(network: nn.Module, blocks: Sequence[object]) -> None:
    """Refuse to adapt MONAI's blocks alone in a network that has attention of another library beside them.

    Raises:
        ValueError: lists the layers that could be taken.
    """
    if blocks:
        require_known_attention(network, "use LoRA(targets=[...]) with patterns of the layers to adapt")


def require_known_layers(network: nn.Module) -> None:
    """Refuse a default of convolutions where they are the smaller part, besides what :func:`require_known_attention` refuses.

    Raises:
        ValueError: lists the layers that could be taken.
    """
    require_known_attention(network)
    if has_attention(network) or _of(network, "monai", "monai_petl"):
        return
    layers: list[Any] = [network.get_submodule(name) for name in _layers(network)]
    linear = [layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear)]
    others = [layer.weight.numel() for layer in layers if not isinstance(layer, nn.Linear)]
    if len(linear) > len(others) and sum(linear) > sum(others):
        raise ValueError(
            f"this {type(network).__name__} works by linear layers ({len(linear)}, beside {len(others)} convolutions), so no "
            f"layers are chosen for you; give targets, patterns of the layers to adapt. It could take: "
            f"{collapsed(_layers(network))}"
        )


def layers_of_file(network: nn.Module, tensors: Iterable[str], tag: str) -> list[str] | None:
    """The layers that an adapter file names, for networks that had a default when it was written and have none today.

    Args:
        network: what the file is loaded into.
        tensors: names such as ``layers.0.conv.lora_A``.
        tag: regular expression of the delta's, such as ``lora``.

    Returns:
        ``None`` where the default holds.
    """
    try:
        require_known_layers(network)
    except ValueError:
        return sorted({found[1] for name in tensors if (found := re.match(rf"(.+)\.{tag}_", name))}) or None
    return None


def collapsed(names: Iterable[str]) -> str:
    """Names as patterns, ``*`` for numbers, and how many there are of each: ``blocks.*.attn.qkv (12)``.

    A number at the end stays, since the layers of one block are not alike.
    A pattern that would also match other names of the list gives way to the first name and the number of its like.
    """
    names = list(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^._])\d+(?=\.)", "*", name), []).append(name)
    parts = []
    for pattern, group in groups.items():
        exact = len(group) > 1 and sum(fnmatchcase(name, pattern) for name in names) == len(group)
        others = f" and {len(group) - 1} like it" if len(group) > 1 else " (1)"
        parts.append(f"{pattern} ({len(group)})" if exact else f"{group[0]}{others}")
    return ", ".join(parts)


def _layers(network: nn.Module) -> list[str]:
    """Names of the layers that can be adapted, without the output of torch's attention, which never calls it."""
    return [
        name
        for name, layer in backbone_modules(network)
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)) and not _in_torchs_own(network, name)
    ]


def _of(module: nn.Module, *packages: str) -> bool:
    """Whether a class is of one of the packages."""
    return type(module).__module__.partition(".")[0] in packages


def _is_attention(module: Any) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    own = [name for name, child in module.named_children() if _projects(child)]
    own += [name.removesuffix("_weight") for name, p in module.named_parameters(recurse=False) if p.ndim > 1]
    if not own or isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return False
    projects = sum(bool(PROJECTIONS.search(name)) for name in own)
    named = re.search("attention|attn", type(module).__name__, re.IGNORECASE)
    if projects == 0:
        return _names(type(module), FUSED)
    return bool(named or projects > 1 or any(name.lower() in ("qkv", "qkvs") for name in own)) or _names(
        type(module), SCALED
    )


def _projects(child: nn.Module) -> bool:
    """Whether a part is a linear layer or a convolution, bare or with a norm around it."""
    inside = sum(isinstance(module, (nn.Linear, *CONVOLUTIONS)) for module in child.modules())
    return 0 < inside <= WRAPPED


def _names(kind: Any, functions: Iterable[str]) -> bool:
    """Whether code of a class names one of the functions."""
    codes = [getattr(member, "__code__", None) for base in kind.__mro__ for member in vars(base).values()]
    return any(code is not None and {*functions} & {*code.co_names} for code in codes)


def _in_torchs_own(network: nn.Module, name: str) -> bool:
    """Whether a layer is the output of torch's attention, which reads its weight and never calls it."""
    return isinstance(network.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
