"""The state of a 2D MONAI network as the state of a 3D network of the same class.

Which rule a tensor needs follows from the module that owns it; the rules are in ``tensor_rules``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from monai.networks.blocks.patchembedding import PatchEmbeddingBlock
from monai.networks.nets.swin_unetr import PatchMerging, PatchMergingV2, WindowAttention
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from monai_petl.networks.vit.attention_bias import RelativePositionBias
from monai_petl.networks.vit.patches import patch_of
from monai_petl.weights.inflation import tensor_rules as rules
from monai_petl.weights.inflation.options import Options
from monai_petl.weights.inflation.report import Report

__all__ = ["Inflated", "inflate_state_dict", "merging_of"]


@dataclass
class Inflated:
    """Tensors for the target, those that it does not share with the source left out, and what became of each."""

    state: dict[str, Tensor]
    report: Report = field(default_factory=Report)


def inflate_state_dict(
    state: Mapping[str, Tensor],
    network: nn.Module,
    mode: rules.Mode = "center",
    *,
    fresh: Mapping[str, str] | None = None,
    unused: Mapping[str, str] | None = None,
    **options: Any,
) -> Inflated:
    """Make the tensors of ``network`` from those of a 2D network of the same class. Both stay as they are.

    Args:
        state: 2D state under MONAI's names: of :func:`convert_state_dict`, or of any 2D MONAI network.
        network: the target, 2D or 3D.
        mode: ``center`` or ``average``.
        fresh: glob -> reason, for tensors of the network that the source need not have.
        unused: glob -> reason, for tensors of the source that the network need not have.
        options: the other attributes of :class:`Options`.

    Raises:
        ValueError: tensors are missing, left over, or do not fit; names them.
    """
    chosen = Options.of(mode, options)
    always = {"*relative_position_index": "belongs to the windows of the target", "*.deltas.*": "of an adapter"}
    fresh = {**always, **(fresh or {})}
    unused = {"*relative_position_index": "belongs to the windows of the source", **(unused or {})}
    plan, own = _plan(network, state), network.state_dict()
    result, used, missing = Inflated({}), set(), []
    for name, target in own.items():
        rule, module = plan.get(name, (_copy, network))
        source = name.replace(".patch_embeddings.1.", ".patch_embeddings.") if rule is _perceptron else name
        if reason := _reason(fresh, name) if source not in state or name.endswith("relative_position_index") else None:
            result.report.fresh[name] = reason
        elif source not in state:
            missing.append(name)
        else:
            tensor, kind, what = _apply(rule, name, module, state[source], target, chosen)
            result.state[name] = tensor.to(target.dtype)
            getattr(result.report, kind)[name] = what
            used.add(source)
    left = [n for n in state if n not in used]
    result.report.dropped.update({n: reason for n in left if (reason := _reason(unused, n))})
    _complain(type(network).__name__, missing, [n for n in left if n not in result.report.dropped])
    return result


def merging_of(network: nn.Module) -> rules.Merging | None:
    """The order in which a network's 3D patch merging concatenates, None without such merging."""
    for module in network.modules():
        if isinstance(module, PatchMergingV2) and module.norm.weight.numel() == 8 * module.dim:
            return _merging(module)
    return None


def _merging(module: PatchMergingV2) -> rules.Merging:
    return "merging" if isinstance(module, PatchMerging) else "mergingv2"


Made = tuple[Tensor, str, str]  # tensor, attribute of the report, what was done
Rule = Callable[[Any, Tensor, Tensor, Options], Made]


def _copy(module: nn.Module, source: Tensor, target: Tensor, options: Options) -> Made:
    return source, "copied", ""


def _image_conv(module: _ConvNd, source: Tensor, target: Tensor, options: Options) -> Made:
    """A convolution that reads the image: colours are summed, unless nothing changes."""
    same = target.ndim == 4 and source.shape[1] == target.shape[1]
    mode = options.channel_mode or ("keep" if same else "share")
    shared = rules.adapt_in_channels(source, target.shape[1], mode)
    tensor, kind, what = _conv(module, shared, target, options)
    if mode == "keep":
        return tensor, kind, what
    return (
        tensor,
        "inflated" if kind == "copied" else kind,
        ", ".join([f"input channels: {target.shape[1]}", what][: 1 + bool(what)]),
    )


def _conv(module: _ConvNd, source: Tensor, target: Tensor, options: Options) -> Made:
    size, kind, done = target.shape[2:], "copied", []
    in_plane, depth = options.in_plane(size), options.depth(size)
    if source.shape[2:] != in_plane and tuple(module.stride) == tuple(module.kernel_size):
        if not options.resize_patch:
            raise ValueError(
                f"patches of {tuple(source.shape[2:])} in the source, {in_plane} in the network. Use the source's patch size "
                "in-plane, or resize_patch=True, which is not exact"
            )
        source = rules.resize_kernel(source, in_plane)
        kind, done = "interpolated", [f"patches of {in_plane}, not exact"]
    if depth is not None:
        source = rules.inflate_kernel(source, depth, options.mode, options.depth_axis)
        kind, done = "inflated" if kind == "copied" else kind, [*done, f"kernel {depth} deep, {options.mode}"]
    return source, kind, ", ".join(done)


def _transposed(module: _ConvTransposeNd, source: Tensor, target: Tensor, options: Options) -> Made:
    if target.ndim == 4:
        return source, "copied", ""
    depth = target.shape[2 + options.depth_axis]
    if depth != module.stride[options.depth_axis]:
        raise ValueError(
            f"a transposed convolution {depth} deep with stride {module.stride[options.depth_axis]} along depth has no exact "
            "2D counterpart; kernel and stride have to be equal there"
        )
    return (
        rules.inflate_transposed_kernel(source, depth, options.depth_axis),
        "inflated",
        f"transposed kernel {depth} deep",
    )


def _perceptron(module: PatchEmbeddingBlock, source: Tensor, target: Tensor, options: Options) -> Made:
    if source.ndim == 1:
        return source, "copied", ""
    size = patch_of(module)
    source = rules.adapt_in_channels(source, target.shape[1] // math.prod(size), options.channel_mode or "share")
    if depth := options.depth(size):
        source = rules.inflate_kernel(source, depth, options.mode, options.depth_axis)
    flat = torch.movedim(source, 1, -1).flatten(1)  # (out, pixels row by row and then channels)
    return flat, "inflated", f"linear patch embedding, {options.mode}"


def _positions(module: PatchEmbeddingBlock, source: Tensor, target: Tensor, options: Options) -> Made:
    patch, count = patch_of(module), source.shape[1]
    if options.img_size is None and len(patch) == 2 and source.shape == target.shape:
        return source, "copied", ""
    if options.img_size is None:
        raise ValueError(
            "img_size is needed to place the position table on the grid of the network. Give its image size"
        )
    tokens = [s // p for s, p in zip(options.img_size, patch, strict=True)]
    in_plane = options.in_plane(tokens)
    grid = options.grid if options.grid and count > 1 else _position_grid(count, in_plane)
    table = rules.resize_pos_embed(
        source, grid, in_plane, options.depth(tokens), options.depth_axis, options.position_mode
    )
    if table.shape != target.shape:
        raise ValueError(
            f"images of {tuple(options.img_size)} voxels have {table.shape[1]} patches of {patch}, the network was built for "
            f"{target.shape[1]}. Give the image size that it was built for"
        )
    if grid != in_plane:
        return table, "interpolated", f"positions from {grid} to {in_plane}, {options.position_mode}"
    return (table, "copied", "") if len(tokens) == 2 else (table, "inflated", "positions repeated along depth")


def _table(module: WindowAttention | RelativePositionBias, source: Tensor, target: Tensor, options: Options) -> Made:
    window = tuple(module.grid if isinstance(module, RelativePositionBias) else module.window_size)
    in_plane, class_rows = options.in_plane(window), 3 * isinstance(module, RelativePositionBias)

    def offsets(sides: Sequence[int]) -> int:
        return math.prod(2 * s - 1 for s in sides) + class_rows

    side = (math.isqrt(source.shape[0] - class_rows) + 1) // 2
    own = next((g for g in (in_plane, (side, side)) if offsets(g) == source.shape[0]), in_plane)
    if options.grid is not None and offsets(options.grid) == source.shape[0]:
        own = options.grid
    table = rules.resize_rel_bias(source, own, in_plane, options.table_mode)
    if depth := options.depth(window):
        table = rules.inflate_rel_bias(table, in_plane, depth, options.depth_axis)
    if own != in_plane:
        return table, "interpolated", f"relative positions from {own} to {in_plane}, {options.table_mode}"
    return (table, "inflated", f"relative positions {depth} deep") if depth else (table, "copied", "")


def _merging_norm(module: PatchMergingV2, source: Tensor, target: Tensor, options: Options) -> Made:
    if source.shape == target.shape:
        return source, "copied", ""
    merging = _merging(module)
    vector = rules.inflate_merging_norm(source, merging, options.depth_axis)
    return vector, "inflated", f"patch merging, order of {merging}"


def _merging_reduction(module: PatchMergingV2, source: Tensor, target: Tensor, options: Options) -> Made:
    if source.shape == target.shape:
        return source, "copied", ""
    merging = _merging(module)
    weight = rules.inflate_merging_reduction(source, merging, options.mode, options.depth_axis)
    return weight, "inflated", f"patch merging, order of {merging}"


_RULES: tuple[tuple[type, tuple[str, ...], Rule], ...] = (  # the first that fits
    (_ConvTransposeNd, ("weight",), _transposed),
    (_ConvNd, ("weight",), _conv),
    (PatchEmbeddingBlock, ("patch_embeddings.1.weight", "patch_embeddings.1.bias"), _perceptron),
    (PatchEmbeddingBlock, ("position_embeddings",), _positions),
    (WindowAttention, ("relative_position_bias_table",), _table),
    (RelativePositionBias, ("relative_position_bias_table",), _table),
    (PatchMergingV2, ("norm.weight", "norm.bias"), _merging_norm),
    (PatchMergingV2, ("reduction.weight",), _merging_reduction),
)


def _plan(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[Rule, nn.Module]]:
    """Name -> rule and owner, for all that is not simply copied."""
    plan: dict[str, tuple[Rule, nn.Module]] = {}
    modules: list[tuple[str, nn.Module]] = list(network.named_modules())
    for prefix, module in modules:
        for kind, leaves, rule in _RULES:
            if isinstance(module, kind):
                for leaf in leaves:
                    plan.setdefault(f"{prefix}.{leaf}".lstrip("."), (rule, module))
    convs = [(name, module) for name, (rule, module) in plan.items() if rule is _conv and name in state]
    if not convs:
        return plan

    def channels(name: str, module: nn.Module) -> tuple[int, int]:
        return state[name].shape[1], module.weight.shape[1]  # type: ignore[union-attr,return-value,index]

    image = channels(
        *convs[0]
    )  # the first one reads the image, and so does one beside it whose channels change in the same way
    for name, module in convs:
        if name == convs[0][0] or (image[0] != image[1] and channels(name, module) == image):
            plan[name] = (_image_conv, module)
    return plan


def _apply(rule: Rule, name: str, module: nn.Module, source: Tensor, target: Tensor, options: Options) -> Made:
    try:
        tensor, kind, what = rule(module, source, target, options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if tensor.shape != target.shape:
        raise ValueError(
            f"{name} has shape {tuple(source.shape)} in the source and {tuple(target.shape)} in the network, which inflation "
            "does not bridge. Build the network with the sizes and options of the source"
        )
    return tensor, kind, what


def _position_grid(count: int, in_plane: tuple[int, ...]) -> tuple[int, ...]:
    """The grid with that many patches: a square, or the target's."""
    square = (math.isqrt(count), math.isqrt(count))
    fits = [g for g in (in_plane, square) if math.prod(g) == count]
    if len(set(fits)) != 1:
        raise ValueError(
            f"the position table has {count} entries, which may be of several grids. Give the source's as grid=(h, w)"
        )
    return fits[0]


def _reason(patterns: Mapping[str, str], name: str) -> str | None:
    return next((why for pattern, why in patterns.items() if fnmatchcase(name, pattern)), None)


def _complain(network: str, missing: Sequence[str], left: Sequence[str]) -> None:
    if missing or left:
        parts = [
            f"{len(names)} tensors {text} ({', '.join(names[:3])})"
            for names, text in (
                (missing, "of the network are not in the source"),
                (left, "of the source are not in the network"),
            )
            if names
        ]
        raise ValueError(
            f"{' and '.join(parts)}: the source does not fit this {network}. Build it with the source's sizes and options"
        )
