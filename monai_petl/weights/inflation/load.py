"""Load a 2D checkpoint of another library into a MONAI network that exists already."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from monai.networks.nets import ResNet, ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from monai_petl.networks.vit.attention_bias import RelativePositionBias, add_attention_bias
from monai_petl.networks.vit.backbone import set_eps
from monai_petl.networks.vit.patches import check_patches, patch_of
from monai_petl.weights.inflation.architecture import Architecture, SwinArchitecture, ViTArchitecture
from monai_petl.weights.inflation.convert import Converted, convert_state_dict
from monai_petl.weights.inflation.files import StateSource, read_checkpoint
from monai_petl.weights.inflation.guarantees import broken_guarantees
from monai_petl.weights.inflation.inflate import inflate_state_dict
from monai_petl.weights.inflation.options import Options
from monai_petl.weights.inflation.report import InexactInflationWarning, Report
from monai_petl.weights.inflation.tensor_rules import Mode, fold_normalization

__all__ = ["convert_checkpoint", "load_pretrained"]

logger = logging.getLogger(__name__)

NETWORKS: dict[str, type[nn.Module]] = {"vit": ViT, "swin": SwinTransformer, "resnet": ResNet}
EMBEDDINGS = {"vit": "patch_embedding.patch_embeddings", "swin": "patch_embed.proj"}
POSITIONS = "patch_embedding.position_embeddings"
FRESH = {
    "vit": {"blocks.*.norm_cross_attn.*": "never used", "classification_head.*": "head of the new task"},
    "swin": {"layers4.0.downsample.*": "merging after the last stage, which 2D networks have not got"},
    "resnet": {"fc.*": "head of the new task"},
}


def convert_checkpoint(source: StateSource, family: str | None = None, **facts: Any) -> Converted:
    """Read and convert: :func:`read_checkpoint`, then :func:`convert_state_dict` with heads and epsilon of ``config.json``.

    Args:
        source: file, folder, name on the Hugging Face hub, or state dict.
        family: the ``source`` of :func:`convert_state_dict`; default: by the names.
        facts: its other arguments; those that are not None go before the config.
    """
    checkpoint = read_checkpoint(source)
    activation = checkpoint.config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(
            f"the checkpoint's config says hidden_act {activation!r}, MONAI computes gelu. Use another checkpoint"
        )
    known = {"num_heads": checkpoint.config.get("num_attention_heads"), "eps": checkpoint.config.get("layer_norm_eps")}
    known = {name: value for name, value in known.items() if isinstance(value, int | float)}
    known.update({name: value for name, value in facts.items() if value is not None})
    return convert_state_dict(checkpoint.state, family, **known)


def load_pretrained(
    network: nn.Module,
    source: StateSource | Converted,
    mode: Mode = "center",
    *,
    img_size: Sequence[int] | int | None = None,
    class_key_bias: bool = False,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    family: str | None = None,
    num_heads: int | None = None,
    grid: Sequence[int] | None = None,
    eps: float | None = None,
    **options: Any,
) -> Report:
    """Convert, inflate and load; sets the epsilon of the layer norms, and adds BEiT's biases to a ViT.

    Args:
        network: a MONAI ViT, SwinTransformer or ResNet, 2D or 3D, or a network with one of them inside (UNETR, SwinUNETR).
        source: what :func:`convert_checkpoint` takes or returns.
        mode: ``center`` or ``average``, see ``inflate_kernel``.
        img_size: spatial size of the images in voxels; a ViT needs it when its tokens are not those of the source, and
            the conditions for an exact start are checked when it is given.
        class_key_bias: add log(depth tokens) to the class token's logits, so that several depth tokens start exactly.
        image_mean, image_std: of each colour, what the source's images were normalised with, in the units of the images that
            the network is to take: folded into the patch embedding. Default: the network takes images as the source did.
        family, num_heads, grid, eps: facts of the source, see :func:`convert_state_dict`.
        options: see ``Options`` of :mod:`monai_petl.weights.inflation.options`.

    Returns:
        What became of every tensor. Also logged.

    Warns:
        InexactInflationWarning: the network does not start as the 2D network; one warning a reason.

    Raises:
        TypeError: the network has nothing of the source's kind.
        ValueError: the source or its sizes do not fit; the network stays as it was.
    """
    source = _converted(source, {"family": family, "num_heads": num_heads, "grid": grid, "eps": eps})
    architecture = source.architecture
    backbone = _backbone(network, architecture.kind)
    options = {"img_size": _spatial(backbone, img_size), "grid": getattr(architecture, "grid", None), **options}
    chosen, state, report = Options.of(mode, options), dict(source.state), Report()
    if image_mean is not None or image_std is not None:
        _fold_normalization(architecture, image_mean, image_std, state, report)
    with _hooks_restored_on_error(backbone):
        fresh, unused = _prepare(backbone, architecture, chosen, state, report, class_key_bias)
        inflated = inflate_state_dict(state, backbone, mode, fresh=fresh, unused=unused, **options)
        if class_key_bias:
            _weigh_class_rows(inflated.state, backbone, chosen, report)
        backbone.load_state_dict(inflated.state, strict=False)
    for name in report.zero_filled:
        inflated.report.interpolated.pop(name, None)
    report = source.report + report + inflated.report
    changed = set_eps(backbone, architecture.eps)
    if changed:
        report.notes.append(f"epsilon of {changed} normalisation layers set to {architecture.eps:g}")
    broken = broken_guarantees(backbone, chosen, source.source, class_key_bias) + _inexact(inflated.report)
    for sentence in broken:
        warnings.warn(f"not exactly the 2D network at the start: {sentence}", InexactInflationWarning, stacklevel=2)
    report.notes += [f"not exact: {sentence}" for sentence in broken]
    logger.info("%s from %s\n%s", type(backbone).__name__, source.source, report)
    return report


def _converted(source: StateSource | Converted, facts: Mapping[str, Any]) -> Converted:
    if not isinstance(source, Converted):
        return convert_checkpoint(source, **facts)
    if given := [name for name, value in facts.items() if value is not None]:
        raise ValueError(f"{given[0]} is a fact for the conversion, and this source is converted already")
    return source


def _backbone(network: nn.Module, kind: str) -> Any:
    wanted = NETWORKS[kind]
    found = [m for m in network.modules() if isinstance(m, wanted)]
    if len(found) != 1:
        raise TypeError(
            f"the source is a {kind}, for one {wanted.__name__} of MONAI; {type(network).__name__} has {len(found)}. Give the "
            "module itself, or a source of the network's kind"
        )
    return found[0]


def _spatial(backbone: Any, img_size: Sequence[int] | int | None) -> tuple[int, ...] | None:
    """Image size along each axis; a ViT's has to be a multiple of its patches."""
    convs = (m for m in backbone.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    embedding = getattr(backbone, "patch_embedding", None)
    dims = len(patch_of(embedding)) if embedding is not None else next(convs).weight.ndim - 2
    if img_size is None:
        return None
    if not isinstance(img_size, int) and len(img_size) != dims:
        raise ValueError(f"img_size must have {dims} values for this network, got {tuple(img_size)}")
    size = tuple(int(s) for s in ensure_tuple_rep(img_size, dims))
    if embedding is not None:
        check_patches(size, patch_of(embedding))
    return size


@contextmanager
def _hooks_restored_on_error(backbone: nn.Module) -> Iterator[None]:
    """A ViT whose attention was given biases is as it was when loading fails."""
    attentions = [block.attn for block in backbone.blocks] if isinstance(backbone, ViT) else []
    before = [(attn.rel_positional_embedding, attn.use_flash_attention) for attn in attentions]
    try:
        yield
    except Exception:
        for attn, (hook, flash) in zip(attentions, before, strict=True):
            attn.rel_positional_embedding, attn.use_flash_attention = hook, flash
        raise


def _prepare(
    network: Any,
    source: Architecture,
    options: Options,
    state: dict[str, Tensor],
    report: Report,
    class_key_bias: bool,
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Fit state and network to each other.

    Returns:
        What of the network stays fresh and what of the source stays unused: glob -> reason.
    """
    if class_key_bias and not isinstance(source, ViTArchitecture):
        raise ValueError(f"class_key_bias is for a ViT with class token, the source is a {source.kind}")
    if isinstance(source, ViTArchitecture | SwinArchitecture) and not source.qkv_bias:
        _zero_qkv_bias(network, state, report)
    if isinstance(source, ViTArchitecture):
        return _prepare_vit(network, source, options, state, report, class_key_bias)
    return FRESH[source.kind], {}


def _prepare_vit(
    network: Any,
    source: ViTArchitecture,
    options: Options,
    state: dict[str, Tensor],
    report: Report,
    class_key_bias: bool,
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """As :func:`_prepare`; gives the ViT the biases that the source has."""
    heads, has_class = network.blocks[0].attn.num_heads, hasattr(network, "cls_token")
    if source.positions and source.grid is None:
        raise ValueError(
            f"the position table has {source.positions} entries, which is no square. Give the source's grid as grid=(h, w)"
        )
    if source.num_heads not in (None, heads):
        raise ValueError(
            f"the source has {source.num_heads} heads, the network {heads}. Build it with the source's; where its tensors do "
            "not tell, the usual width of a head is assumed, and num_heads= or a config.json beside the file overrules"
        )
    if source.qkv_bias and network.blocks[0].attn.qkv.bias is None:
        raise ValueError(
            "the source has query, key and value biases, the network has none. Build it with qkv_bias=True"
        )
    if has_class and not source.class_token:
        raise ValueError("the network has a class token, the source has none. Build it with classification=False")
    if not source.positions:  # MONAI keeps a table of zeros, which would train
        network.patch_embedding.position_embeddings.requires_grad_(False)
        state[POSITIONS] = torch.zeros(1, 1, source.hidden_size)
        report.zero_filled[POSITIONS] = "the source has no absolute positions"
    tokens = None
    if source.relative_bias or class_key_bias:
        if options.img_size is None or not has_class:
            raise ValueError(
                "attention biases need the image size and the class token. Give img_size, and a ViT with classification=True"
            )
        tokens = [s // p for s, p in zip(options.img_size, patch_of(network.patch_embedding), strict=True)]
    if tokens and source.relative_bias:
        add_attention_bias(network, "table", tokens, heads)
    elif tokens and (depth := options.depth(tokens) or 1) > 1:
        add_attention_bias(network, "class_key", tokens, heads, depth)
        for i in range(len(network.blocks)):
            state[f"blocks.{i}.attn.rel_positional_embedding.value"] = torch.tensor(math.log(depth))
    fresh = dict(FRESH["vit"])
    if not source.final_norm:
        fresh["norm.*"] = "the source has no final norm: take the hidden states"
    return fresh, {} if has_class or not source.class_token else {"cls_token": "the network has no class token"}


def _fold_normalization(
    source: Architecture,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    state: dict[str, Tensor],
    report: Report,
) -> None:
    """Mean and standard deviation of the source's images, into kernel and bias of the patch embedding."""
    if source.kind not in EMBEDDINGS:
        raise ValueError(
            "image_mean and image_std can be folded into patches, not into convolutions that pad their images, as those of a "
            f"{source.kind}. Normalise the images instead"
        )
    for values in (mean, std):
        if values is not None and not hasattr(values, "__len__"):
            raise ValueError(f"image_mean and image_std need a number for each channel, got {values!r}")
    mean = [0.0] * source.in_channels if mean is None else [float(m) for m in mean]
    std = [1.0] * source.in_channels if std is None else [float(s) for s in std]
    if len(mean) != source.in_channels or len(std) != source.in_channels or min(std) <= 0:
        raise ValueError(
            f"image_mean and image_std need a number for each of the source's {source.in_channels} channels, and positive "
            f"deviations; got {mean} and {std}"
        )
    weight, bias = (f"{EMBEDDINGS[source.kind]}.{p}" for p in ("weight", "bias"))
    state[weight], state[bias] = fold_normalization(state[weight], state[bias], mean, std)
    report.folded["normalisation of the source's images"] = "into the patch embedding"


def _weigh_class_rows(state: dict[str, Tensor], network: Any, options: Options, report: Report) -> None:
    """Relative position tables have rows of their own for the class key: log(depth) goes there."""
    for i, block in enumerate(network.blocks):
        hook = block.attn.rel_positional_embedding
        if isinstance(hook, RelativePositionBias) and len(hook.grid) == 3:
            name = f"blocks.{i}.attn.rel_positional_embedding.relative_position_bias_table"
            table = state[name].clone()
            table[-2:] += math.log(hook.grid[options.depth_axis])  # patch to class, class to class
            state[name] = table
            report.folded[f"class key bias of block {i}"] = "into the relative position table"


def _zero_qkv_bias(network: nn.Module, state: dict[str, Tensor], report: Report) -> None:
    for name, tensor in network.state_dict().items():
        if name.endswith("attn.qkv.bias"):
            state[name] = torch.zeros_like(tensor)
            report.zero_filled[name] = "the source has no such bias"


def _inexact(report: Report) -> list[str]:
    """What was changed or left out of the source, so that the network cannot start as the source's."""
    kernels = [n for n, what in report.interpolated.items() if "not exact" in what]
    broken = [f"the kernel {n} was resized: use the source's patch size in-plane" for n in kernels]
    if "cls_token" in report.dropped:
        broken.append(
            "the class token of the source is left out, which all tokens attend to: keep it by classification=True"
        )
    return broken
