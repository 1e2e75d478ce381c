"""Where in a MONAI network a method attaches: layers by the role they play, or by a pattern of their names."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from monai.networks.blocks import MLPBlock, PatchEmbeddingBlock, TransformerBlock
from monai.networks.blocks.crossattention import CrossAttentionBlock
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import (
    PatchEmbed,
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
)
from torch import nn

from monai_petl.core.deltas import deltas_of

__all__ = [
    "PRESETS",
    "ROLES",
    "Site",
    "attention_of",
    "backbone_modules",
    "find_sites",
    "has_attention",
    "matches",
    "transformer_blocks",
    "unused_parameters",
    "used_modules",
    "vision_transformers",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
SLOTS = {"q": 0, "k": 1, "v": 2}
ROLES = {
    "q": "query projection of attention",
    "k": "key projection",
    "v": "value projection",
    "proj": "output projection of attention",
    "mlp": "both linear layers of transformer blocks",
    "patch_embedding": "embedding of the patches",
    "merging": "reduction between the stages of a Swin transformer",
    "conv": "convolutions, other than that of the patches",
    "transposed_conv": "transposed convolutions",
    "linear": "all other linear layers",
    "norm": "normalisation layers with scale and shift",
}
PRESETS = {
    "attention": ("q", "k", "v", "proj"),
    "all-linear": ("q", "k", "v", "proj", "mlp"),
    "all-conv": ("conv", "transposed_conv"),
    "transformer": ("q", "k", "v", "proj", "mlp", "patch_embedding", "merging", "norm"),
    "convolutional": ("conv", "transposed_conv", "norm"),
}


@dataclass(frozen=True)
class Site:
    """A layer to adapt.

    Attributes:
        name: its dotted name in the network.
        layer: the module.
        slots: which thirds of a fused qkv projection (0 query, 1 key, 2 value); nothing for other layers.
    """

    name: str
    layer: nn.Module
    slots: tuple[int, ...] = ()


def find_sites(
    network: nn.Module, targets: Sequence[str], exclude: Sequence[str] = (), kinds: tuple[type[nn.Module], ...] = ()
) -> list[Site]:
    """The layers that ``targets`` name, in the network's order, each once.

    Args:
        network: any network; layers that it does not use, and those inside deltas, are left out.
        targets: roles (a key of :data:`ROLES`), presets (a key of :data:`PRESETS`), or glob patterns of whole dotted
            names, such as ``"*.mlp.linear1"``.
        exclude: patterns of names to leave out.
        kinds: layers that a pattern may find; default linear layers and convolutions.

    Raises:
        ValueError: a target finds nothing, with the nearest names.
        TypeError: a pattern finds layers of other kinds only.
    """
    if isinstance(targets, str) or isinstance(exclude, str):
        raise ValueError(f"targets and exclude must be lists of roles or patterns, got {targets!r} and {exclude!r}")
    roles = list(_roles(network))
    chosen: dict[str, Site] = {}
    for target in targets:
        known = PRESETS.get(target, (target,) if target in ROLES else ())
        found = [site for role in known for site in _with_role(roles, role)]
        if not known:
            found = _named(network, roles, target, kinds or (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))
        if not found:
            there = sorted({role for _, _, role, _ in roles})
            raise ValueError(
                f"no layer of this {type(network).__name__} has the role {target!r}; it has layers with the roles: "
                f"{', '.join(there) or 'none'}"
            )
        for site in found:
            if not any(matches(site.name, pattern) for pattern in exclude):
                slots = tuple(sorted({*chosen[site.name].slots, *site.slots})) if site.name in chosen else site.slots
                chosen[site.name] = Site(site.name, site.layer, slots)
    if not chosen:
        raise ValueError(
            f"nothing is left to adapt: targets {list(targets)}, of which exclude {list(exclude)} takes all"
        )
    order = {name: place for place, (name, _) in enumerate(network.named_modules())}
    return sorted(chosen.values(), key=lambda site: order[site.name])


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name, or the name of a module around it, matches the glob pattern as a whole."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def backbone_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As :func:`used_modules`, without side networks: modules whose attribute ``beside_backbone`` is true, and their parts."""
    beside = tuple(f"{name}." for name, module in network.named_modules() if getattr(module, "beside_backbone", False))
    return ((name, module) for name, module in used_modules(network) if not f"{name}.".startswith(beside))


def used_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules of a network that contribute to its output, without those inside deltas.

    Left out are the cross attention that blocks do not use, what another layer stands in for (a replaced head), and modules
    whose attribute ``never_used`` a network has set.
    """
    names = {module: name for name, module in network.named_modules()}
    unused = [
        f"{names[layer]}." for layer, delta in deltas_of(network) if delta.active and delta.replacement is not None
    ]
    for name, module in network.named_modules():
        if getattr(module, "never_used", False):
            unused.append(f"{name}.")
        if isinstance(module, TransformerBlock) and not module.with_cross_attention:
            unused += [f"{name}.cross_attn.".lstrip("."), f"{name}.norm_cross_attn.".lstrip(".")]
    for name, module in network.named_modules():
        if "deltas" not in name.split(".") and not f"{name}.".startswith(tuple(unused)):
            yield name, module


def unused_parameters(network: nn.Module) -> set[str]:
    """Names of parameters that never train: of parts that blocks do not use, and position tables that are no parameters."""
    used = {name for name, _ in used_modules(network)}
    unused = {n for n, _ in network.named_parameters() if n.rpartition(".")[0] not in used}
    for name, module in backbone_modules(network):
        if isinstance(module, PatchEmbeddingBlock) and module.pos_embed_type != "learnable":
            unused.add(f"{name}.position_embeddings".lstrip("."))
    return unused


def transformer_blocks(network: nn.Module) -> list[tuple[str, TransformerBlock | SwinTransformerBlock]]:
    """Blocks of all transformers in the network, in order.

    Raises:
        TypeError: there are none.
    """
    found = [(n, m) for n, m in backbone_modules(network) if isinstance(m, TransformerBlock | SwinTransformerBlock)]
    if not found:
        raise TypeError(
            f"this {type(network).__name__} has no transformer blocks (of MONAI's ViT, UNETR or SwinUNETR); use "
            "LoRA(targets=['all-conv']), NormOnly(), BiasOnly() or FullFineTuning() for convolutional networks"
        )
    return found


def vision_transformers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """MONAI's ``ViT`` and ``SwinTransformer`` modules in the network, or the network itself."""
    return [(n, m) for n, m in backbone_modules(network) if isinstance(m, ViT | SwinTransformer)]


def has_attention(network: nn.Module) -> bool:
    """Whether the network has self-attention that methods know."""
    return any(isinstance(m, SABlock | WindowAttention) for _, m in backbone_modules(network))


def attention_of(network: nn.Module) -> list[tuple[str, SABlock | WindowAttention]]:
    """Self-attention modules in the network, in order.

    Raises:
        TypeError: there are none.
    """
    found = [(n, m) for n, m in backbone_modules(network) if isinstance(m, SABlock | WindowAttention)]
    if not found:
        raise TypeError(
            f"this {type(network).__name__} has no attention (MONAI's SABlock or WindowAttention); use "
            "LoRA(targets=['all-conv']) for convolutional networks"
        )
    return found


Role = tuple[str, nn.Module, str, tuple[int, ...]]


def _with_role(roles: Sequence[Role], role: str) -> list[Site]:
    return [Site(name, layer, slots) for name, layer, known, slots in roles if known == role]


def _named(network: nn.Module, roles: Sequence[Role], pattern: str, allowed: tuple[type, ...]) -> list[Site]:
    modules = dict(backbone_modules(network))
    inside = {
        f"{n}.{part}" for n, m in modules.items() if isinstance(m, nn.MultiheadAttention) for part in ("out_proj",)
    }
    named = {name: module for name, module in modules.items() if name and fnmatchcase(name, pattern)}
    fused = {name: slots for name, _, _, slots in roles if slots}
    sites = [
        Site(name, module, (0, 1, 2) if name in fused else ())
        for name, module in named.items()
        if isinstance(module, allowed) and name not in inside
    ]
    if sites:
        return sites
    if named:
        kinds = sorted({type(module).__name__ for module in named.values()})
        raise TypeError(
            f"{pattern!r} names {len(named)} modules of this {type(network).__name__}, which are {', '.join(kinds)}; only "
            f"{', '.join(kind.__name__ for kind in allowed)} can be adapted (and not inside torch's MultiheadAttention)"
        )
    candidates = [name for name, module in modules.items() if isinstance(module, allowed)]
    near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.3) or candidates[:3]
    raise ValueError(
        f"no layer of this {type(network).__name__} is called {pattern!r}. Patterns match whole dotted names; the nearest are "
        f"{', '.join(near) or 'none'}. Roles are: {', '.join(ROLES)}"
    )


def _roles(network: nn.Module) -> Iterator[Role]:
    """Every layer that can be adapted, with its role; one of a fused qkv projection comes three times."""
    special: dict[int, list[tuple[str, tuple[int, ...]]]] = {}

    def note(layer: nn.Module, role: str, slots: tuple[int, ...] = ()) -> None:
        special.setdefault(id(layer), []).append((role, slots))

    for _, module in backbone_modules(network):
        if isinstance(module, SABlock | WindowAttention) and isinstance(module.qkv, nn.Linear):
            for role, slot in SLOTS.items():
                note(module.qkv, role, (slot,))
        if isinstance(module, CrossAttentionBlock) or (isinstance(module, SABlock) and not module.use_combined_linear):
            for role in SLOTS:
                note(getattr(module, f"to_{role}"), role)
        if isinstance(module, SABlock | CrossAttentionBlock):
            note(module.out_proj, "proj")
        if isinstance(module, WindowAttention):
            note(module.proj, "proj")
        if isinstance(module, MLPBlock):
            note(module.linear1, "mlp")
            note(module.linear2, "mlp")
        if isinstance(module, PatchMergingV2):
            note(module.reduction, "merging")
        if isinstance(module, PatchEmbeddingBlock | PatchEmbed):
            for layer in module.modules():
                if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
                    note(layer, "patch_embedding")
        if isinstance(module, nn.MultiheadAttention):
            note(module.out_proj, "")
    for name, module in backbone_modules(network):
        if id(module) in special:
            yield from ((name, module, role, slots) for role, slots in special[id(module)] if role)
        elif isinstance(module, CONVOLUTIONS):
            yield name, module, "conv", ()
        elif isinstance(module, TRANSPOSED):
            yield name, module, "transposed_conv", ()
        elif isinstance(module, nn.Linear):
            yield name, module, "linear", ()
        elif isinstance(module, NORMS) and getattr(module, "weight", None) is not None:
            yield name, module, "norm", ()
