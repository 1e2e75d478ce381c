"""Fold, fuse and check a renamed 2D state, and read the architecture from its shapes: one function a kind of network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_petl.weights.inflation.architecture import ResNetArchitecture, SwinArchitecture, ViTArchitecture
from monai_petl.weights.inflation.report import Report

__all__ = ["TABLE", "Given", "read_resnet", "read_swin", "read_vit"]

TABLE = "attn.rel_positional_embedding.relative_position_bias_table"  # where MONAI's SABlock calls a bias module
POSITIONS = "patch_embedding.position_embeddings"
KERNEL = "patch_embedding.patch_embeddings.weight"
HEAD_WIDTHS = {1152: 72, 1280: 80, 1408: 88, 1664: 104}  # hidden size -> width of a head in published ViTs; 64 else


@dataclass(frozen=True)
class Given:
    """What the tensors do not tell. ``class_entry``: position tables of this family always begin with the class token."""

    eps: float
    num_heads: int | None
    grid: tuple[int, int] | None
    class_entry: bool


def read_vit(tensors: dict[str, Tensor], report: Report, given: Given) -> ViTArchitecture:
    """Fold and fuse in place; read the architecture."""
    layers = _count(tensors, "blocks.")
    blocks = [f"blocks.{i}" for i in range(layers)]
    _fuse_qkv(tensors, report, [f"{b}.attn" for b in blocks])
    _fold_layer_scale(tensors, report, blocks)
    _place_tables(tensors, report, blocks)
    parts = ("norm1", "attn.qkv", "attn.out_proj", "norm2", "mlp.linear1", "mlp.linear2")
    wanted = [f"{b}.{part}.{p}" for b in blocks for part in parts for p in ("weight", "bias")]
    no_bias = [f"{b}.attn.qkv.bias" for b in blocks]
    _require(tensors, [KERNEL, KERNEL.replace("weight", "bias"), *wanted], optional=no_bias)
    kernel, mlp = tensors[KERNEL], tensors["blocks.0.mlp.linear1.weight"]
    hidden = kernel.shape[0]
    if kernel.ndim != 4:
        raise ValueError(
            f"the kernel of the patch embedding has shape {tuple(kernel.shape)}, not (out, in, h, w): it is no 2D "
            "network. Use a checkpoint of images"
        )
    if mlp.shape[0] != tensors["blocks.0.mlp.linear2.weight"].shape[1]:
        raise ValueError(
            f"the MLP goes from {mlp.shape[0]} to {tensors['blocks.0.mlp.linear2.weight'].shape[1]} values, it is a gated "
            "(SwiGLU) one, which MONAI's ViT has not got. Use a checkpoint with a plain MLP"
        )
    _all_or_none(tensors, ["norm.weight", "norm.bias"])
    grid, positions = _split_positions(tensors, report, given)
    num_heads, grid = _heads_and_grid(tensors, report, given, hidden, grid, positions)
    return ViTArchitecture(
        in_channels=kernel.shape[1],
        eps=given.eps,
        hidden_size=hidden,
        mlp_dim=mlp.shape[0],
        num_layers=layers,
        num_heads=num_heads,
        patch_size=(kernel.shape[2], kernel.shape[3]),
        grid=grid,
        positions=positions,
        class_token="cls_token" in tensors,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        final_norm="norm.weight" in tensors,
        relative_bias=f"blocks.0.{TABLE}" in tensors,
    )


def _fold_layer_scale(tensors: dict[str, Tensor], report: Report, blocks: Sequence[str]) -> None:
    scales = ("scale1", "attn.out_proj"), ("scale2", "mlp.linear2")
    for scale, _ in scales:
        _all_or_none(tensors, [f"{b}.{scale}" for b in blocks])
    for scale, into in ((f"{b}.{scale}", f"{b}.{into}") for b in blocks for scale, into in scales):
        if scale in tensors:
            factor = tensors.pop(scale)
            for p in ("weight", "bias"):
                tensor = _one(tensors, f"{into}.{p}")
                if factor.numel() != tensor.shape[0]:
                    raise ValueError(
                        f"the layer scale {scale} has {factor.numel()} values, and {into}.{p} the shape "
                        f"{tuple(tensor.shape)}: they do not belong together. Get the complete file"
                    )
                tensors[f"{into}.{p}"] = tensor * factor.view(-1, *[1] * (tensor.ndim - 1))
            report.folded[scale] = "layer scale, into the linear layer before it"


def _heads_and_grid(
    tensors: Mapping[str, Tensor],
    report: Report,
    given: Given,
    hidden: int,
    grid: tuple[int, int] | None,
    positions: int,
) -> tuple[int | None, tuple[int, int] | None]:
    """Number of heads, from the bias table, else as given, else from the usual width; and the grid, from the table too."""
    num_heads = given.num_heads
    table = tensors.get(f"blocks.0.{TABLE}")
    if table is not None:
        num_heads = table.shape[1]
        side = (math.isqrt(table.shape[0] - 3) + 1) // 2
        grid = grid or (side, side)
        if (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 != table.shape[0]:
            raise ValueError(
                f"the relative position table has {table.shape[0]} rows, which is no grid of {grid[0]}x{grid[1]} patches "
                "with class token. Give the grid of the source as grid=(h, w)"
            )
    elif not positions:
        raise ValueError(
            "the checkpoint holds no positions, neither a table nor relative ones: they may be computed in its network (rotary "
            "or sine positions), which MONAI's ViT does not do. Use a checkpoint with a position table"
        )
    elif num_heads is None:
        width = HEAD_WIDTHS.get(hidden, 64)
        num_heads = hidden // width if hidden % width == 0 else None
        report.notes.append(f"{num_heads or 'no'} heads, from the usual head width of {width}; num_heads= overrules")
    if num_heads and hidden % num_heads:
        raise ValueError(f"num_heads must divide the hidden size {hidden}, got {num_heads}")
    return num_heads, grid


def _fuse_qkv(tensors: dict[str, Tensor], report: Report, attentions: Sequence[str]) -> None:
    """Stack query, key and value rows; biases that one of the three lacks in all blocks are zero, as in BEiT."""
    for n in "qkv":
        _all_or_none(tensors, [f"{attention}.{n}.bias" for attention in attentions])
    for attention in attentions:
        if f"{attention}.q.weight" in tensors:
            rows = [_one(tensors, f"{attention}.{n}.weight") for n in "qkv"]
            _alike(rows, f"{attention}.q, k and v")
            tensors[f"{attention}.qkv.weight"] = torch.cat(rows)
            for n in "qkv":
                del tensors[f"{attention}.{n}.weight"]
        biases = {n: tensors.pop(f"{attention}.{n}.bias") for n in "qkv" if f"{attention}.{n}.bias" in tensors}
        if not biases:
            continue
        _alike([*biases.values()], f"the biases of {attention}.q, k and v")
        zeros = torch.zeros_like(next(iter(biases.values())))
        for n in (n for n in "qkv" if n not in biases):
            report.zero_filled[f"{attention}.{n}.bias"] = "the source has no such bias"
        tensors[f"{attention}.qkv.bias"] = torch.cat([biases.get(n, zeros) for n in "qkv"])


def _place_tables(tensors: dict[str, Tensor], report: Report, blocks: Sequence[str]) -> None:
    """Relative position tables, of a block or shared by all, under the name of the module that adds them."""
    shared = tensors.pop("table", None)
    if shared is not None:
        report.notes.append(
            "one relative position table is shared by all blocks in the source; every block gets a copy"
        )
    _all_or_none(tensors, [f"{block}.table" for block in blocks])
    for block in blocks:
        table = tensors.pop(f"{block}.table", None)
        if table is not None or shared is not None:
            tensors[f"{block}.{TABLE}"] = table if table is not None else shared.clone()  # type: ignore[union-attr]


def _split_positions(tensors: dict[str, Tensor], report: Report, given: Given) -> tuple[tuple[int, int] | None, int]:
    """Fold the class entry of the position table into the class token; returns grid and number of patches."""
    table, grid = tensors.pop("pos_embed", None), given.grid
    if table is None:
        return grid, 0
    if table.ndim != 3 or len(table) != 1:
        raise ValueError(f"the position table has shape {tuple(table.shape)}, not (1, N, C). Get the complete file")
    entries, has_class = table.shape[1], "cls_token" in tensors
    counts = [entries - 1, entries] if has_class and not given.class_entry else [entries - has_class]
    square = [n for n in counts if math.isqrt(n) ** 2 == n]
    patches = math.prod(grid) if grid else (square or counts)[0]
    if patches not in counts:
        raise ValueError(
            f"the position table has {entries} entries{', one for the class token' if has_class else ''}: no grid of "
            f"{' x '.join(map(str, grid or ()))} patches. Give the grid that the source was trained with as grid=(h, w)"
        )
    if patches < entries:  # MONAI adds positions before it prepends the class token
        tensors["cls_token"] = tensors["cls_token"] + table[:, :1]
        report.folded["position of the class token"] = "into the class token"
    elif has_class:
        report.notes.append(f"the position table has {entries} entries and none for the class token; grid= overrules")
    tensors[POSITIONS] = table[:, entries - patches :]
    if grid is None and square:
        grid = (math.isqrt(patches), math.isqrt(patches))
    return grid, patches


def read_swin(tensors: dict[str, Tensor], report: Report, given: Given) -> SwinArchitecture:
    """Complete the tensors of a Swin transformer in place (query, key and value fused), and say what network holds them.

    Raises:
        ValueError: tensors are missing, there are more than four stages, or windows that differ.
    """
    stages = [f"layers{s + 1}.0" for s in range(4)]
    depths = tuple(_count(tensors, f"{stage}.blocks.") for stage in stages)
    blocks = [[f"{stage}.blocks.{b}" for b in range(depth)] for stage, depth in zip(stages, depths, strict=True)]
    _fuse_qkv(tensors, report, [f"{b}.attn" for stage in blocks for b in stage])
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.linear1", "mlp.linear2")
    every = [b for stage in blocks for b in stage]
    wanted = [f"{b}.{part}.{p}" for b in every for part in parts for p in ("weight", "bias")]
    wanted += [f"{b}.attn.relative_position_bias_table" for b in every]
    merging = [f"{s}.downsample.{n}" for s in stages[:3] for n in ("norm.weight", "norm.bias", "reduction.weight")]
    no_bias = [f"{b}.attn.qkv.bias" for b in every]
    _require(tensors, ["patch_embed.proj.weight", "patch_embed.proj.bias", *wanted, *merging], optional=no_bias)
    _all_or_none(tensors, ["patch_embed.norm.weight", "patch_embed.norm.bias"])
    if extra := [n for n in tensors if n.startswith("layers") and not n.startswith(tuple(stages))]:
        raise ValueError(f"the checkpoint has more than four stages ({extra[0]}); MONAI's SwinTransformer has four")
    for s in stages[:3]:
        lengths = [len(tensors[f"{s}.downsample.norm.{p}"]) for p in ("weight", "bias")]
        if {*lengths} != {tensors[f"{s}.downsample.reduction.weight"].shape[1]}:
            raise ValueError(
                f"{s}.downsample has a norm of {lengths[0]} and {lengths[1]} values for a reduction of "
                f"{tensors[f'{s}.downsample.reduction.weight'].shape[1]}. Get the complete file"
            )
    tables = [tensors[f"{stage[0]}.attn.relative_position_bias_table"] for stage in blocks]
    window = (math.isqrt(tables[0].shape[0]) + 1) // 2
    if any(t.shape[0] != (2 * window - 1) ** 2 for t in tables):
        raise ValueError(
            f"the relative position tables have {', '.join(str(t.shape[0]) for t in tables)} rows; MONAI's SwinTransformer "
            "has one square window for all stages. Use a checkpoint of the size that it was pre-trained with"
        )
    kernel = tensors["patch_embed.proj.weight"]
    return SwinArchitecture(
        in_channels=kernel.shape[1],
        eps=given.eps,
        embed_dim=kernel.shape[0],
        depths=depths,
        num_heads=tuple(t.shape[1] for t in tables),
        window_size=(window, window),
        patch_size=(kernel.shape[2], kernel.shape[3]),
        mlp_ratio=tensors[f"{blocks[0][0]}.mlp.linear1.weight"].shape[0] / kernel.shape[0],
        qkv_bias=f"{blocks[0][0]}.attn.qkv.bias" in tensors,
        patch_norm="patch_embed.norm.weight" in tensors,
    )


def read_resnet(tensors: dict[str, Tensor], report: Report, given: Given) -> ResNetArchitecture:
    """Check the tensors of a ResNet, and say what network holds them.

    Raises:
        ValueError: tensors are missing, or the blocks are wide or grouped.
    """
    stages = [f"layer{s + 1}" for s in range(4)]
    layers = tuple(_count(tensors, f"{stage}.") for stage in stages)
    bottleneck = "layer1.0.conv3.weight" in tensors
    convs = range(1, 4 if bottleneck else 3)
    pairs = ["", *(f"{s}.{b}." for s, n in zip(stages, layers, strict=True) for b in range(n))]
    wanted = [f"{pair}conv{i}.weight" for pair in pairs for i in (convs if pair else (1,))]
    statistics = ("weight", "bias", "running_mean", "running_var")
    wanted += [f"{pair}bn{i}.{t}" for pair in pairs for i in (convs if pair else (1,)) for t in statistics]
    _require(tensors, wanted)
    planes = tuple(tensors[f"{s}.0.conv1.weight"].shape[0] for s in stages)
    widths = tuple(tensors[f"{s}.0.conv{convs[-1]}.weight"].shape[0] for s in stages)
    grouped = any(tensors[f"{s}.0.conv2.weight"].shape[1] != n for s, n in zip(stages, planes, strict=True))
    if grouped or widths != tuple(n * (4 if bottleneck else 1) for n in planes):
        raise ValueError(
            f"the blocks are {planes} wide inside and {widths} outside{', with grouped kernels' if grouped else ''}: a wide "
            "ResNet or ResNeXt, which MONAI's ResNet is not. Use a plain ResNet"
        )
    kernel = tensors["conv1.weight"]
    return ResNetArchitecture(
        in_channels=kernel.shape[1],
        eps=given.eps,
        block="bottleneck" if bottleneck else "basic",
        layers=layers,
        block_inplanes=planes,
        conv1_size=(kernel.shape[2], kernel.shape[3]),
    )


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks ``prefix0``, ``prefix1``, ..."""
    found = {n.removeprefix(prefix).split(".")[0] for n in tensors if n.startswith(prefix)}
    if not found:
        raise ValueError(f"the checkpoint has no tensor for {prefix}0, it is not whole. Get the complete file")
    for text in found:
        if not text.isdecimal() or len(text) > 6 or int(text) >= len(tensors):
            raise ValueError(
                f"the checkpoint has tensors of {prefix}{text}, and {len(tensors)} tensors in all, so blocks before it are "
                "missing. Get the complete file"
            )
    return max(map(int, found)) + 1


def _one(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    _require(tensors, [name])
    return tensors[name]


def _all_or_none(tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise when some of the tensors that come together are missing."""
    missing = [n for n in names if n not in tensors]
    if 0 < len(missing) < len(names):
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors that would become {', '.join(missing[:3])}, though it has others of "
            "their kind; it is not whole. Get the complete file"
        )


def _alike(tensors: Sequence[Tensor], names: str) -> None:
    """Raise when tensors that are stacked have different shapes."""
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"{names} have the shapes {shapes}; MONAI's attention has one for all. Use a checkpoint of plain attention"
        )


def _require(tensors: Mapping[str, Tensor], names: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raise for what is missing; the optional ones may be missing together."""
    allowed = set() if any(n in tensors for n in optional) else set(optional)
    missing = [n for n in names if n not in tensors and n not in allowed]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors that would become {', '.join(missing[:3])}; it is not whole, or of "
            "another family. Get the complete file, or name the right family"
        )
