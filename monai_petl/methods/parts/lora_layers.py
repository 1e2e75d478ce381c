"""Low-rank deltas of single layers: linear layers, fused qkv projections, convolutions and transposed convolutions.

E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685 (2021); S.-Y. Liu et al., "DoRA:
Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353 (2024). The three-dimensional convolutions are ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from monai_petl.core.deltas import Delta
from monai_petl.core.roles import CONVOLUTIONS, TRANSPOSED, Site

__all__ = ["DoRADelta", "LoRADelta", "largest_rank", "lora_delta"]


class LoRADelta(Delta):
    """g B A x, beside W x. The factor A starts at random and B at zero, so that nothing changes at first.

    Args:
        rank: inner width r.
        scale: g, that is alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout: on the input of this path.
    """

    tag = "lora"

    def __init__(self, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def initialise(self, factor_a: Tensor, factor_b: Tensor, gaussian: bool) -> None:
        """Uniform within 1 / sqrt(inputs), as the authors' code does, or Gaussian of deviation 1 / r."""
        nn.init.zeros_(factor_b)
        if gaussian:
            nn.init.normal_(factor_a, std=1 / self.rank)
        else:
            bound = 1 / math.sqrt(factor_a[0].numel())
            nn.init.uniform_(factor_a, -bound, bound)

    def weight(self) -> Tensor:
        """What is added to the layer's weight, of the weight's shape."""
        raise NotImplementedError(f"{type(self).__name__} must define weight()")

    def rows(self, layer: nn.Module) -> Tensor:
        """Numbers of the layer's outputs that this delta touches."""
        return torch.arange(_by_rows(layer, cast(Tensor, layer.weight)).shape[0])

    def merged_parameters(self, layer: nn.Module) -> dict[str, Tensor]:
        weight = cast(Tensor, layer.weight)
        precise = torch.promote_types(weight.dtype, torch.float32)
        factors = self if weight.dtype == precise else copy.deepcopy(self).to(precise)
        return {"weight": weight.to(precise) + factors.weight()}


class LinearLoRA(LoRADelta):
    """Of a linear layer: A (r, inputs), B (outputs, r)."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float, gaussian: bool) -> None:
        super().__init__(rank, scale, dropout)
        self.A = nn.Linear(layer.in_features, rank, bias=False)
        self.B = nn.Linear(rank, layer.out_features, bias=False)
        self.initialise(self.A.weight.data, self.B.weight.data, gaussian)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inner = self.A(self.dropout(x))  # (..., r)
        return _add_product(y, inner, self.B.weight, self.scale)

    def weight(self) -> Tensor:
        return self.scale * (self.B.weight @ self.A.weight)


class FusedLoRA(LoRADelta):
    """Of some of q, k and v in one projection, each with factors of its own: A (n, r, inputs), B (n, outputs / 3, r).

    The other thirds of the output stay as they are, bit for bit.
    """

    def __init__(
        self, layer: nn.Linear, slots: Sequence[int], rank: int, scale: float, dropout: float, gaussian: bool
    ) -> None:
        super().__init__(rank, scale, dropout)
        self.slots, n = tuple(slots), len(slots)
        self.A = nn.Parameter(torch.empty(n, rank, layer.in_features))
        self.B = nn.Parameter(torch.empty(n, layer.out_features // 3, rank))
        for i in range(n):
            self.initialise(self.A.data[i], self.B.data[i], gaussian)
        places = torch.zeros(3, n)
        places[self.slots, range(n)] = 1
        self.places: Tensor
        self.register_buffer("places", places, persistent=False)  # which third belongs to which factors

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inner = F.linear(self.dropout(x), self.A.flatten(0, 1))  # (..., n r)
        return _add_product(y, inner, self.up(), self.scale)

    def up(self) -> Tensor:
        """B as that of one factorisation of the whole layer (outputs, n r), with blocks of zeros."""
        spread = self.places[:, None, :, None] * self.B.transpose(0, 1)  # (3, outputs / 3, n, r)
        return spread.flatten(2).flatten(0, 1)

    def weight(self) -> Tensor:
        return self.scale * torch.einsum("sn,nor,nri->soi", self.places, self.B, self.A).flatten(0, 1)

    def rows(self, layer: nn.Module) -> Tensor:
        width = self.B.shape[1]
        return torch.cat([torch.arange(slot * width, (slot + 1) * width) for slot in self.slots])


class _ConvolutionLoRA(LoRADelta):
    """Of a convolution in G groups, by two: A down to G r channels, B back up."""

    def __init__(self, layer: Any, rank: int, scale: float, dropout: float, factors: Sequence[Any]) -> None:
        super().__init__(rank, scale, dropout)
        self.groups, self.inputs = layer.groups, layer.in_channels
        self.A, self.B = factors
        self.shrinking = math.prod(self.A.stride)  # voxels of the input for each at which A is evaluated

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.B(self.scale * self.A(self.dropout(x)))

    def folded(self, weight: Tensor, x: Tensor) -> Tensor | None:
        """W + g B A costs operations by the weight's size, the path beside it by the image's; gradients want the path."""
        voxels = x.numel() // (self.inputs * self.shrinking)
        cheaper = self.rank * weight.numel() < voxels * (self.A.weight.numel() + self.B.weight.numel())
        trains = torch.is_grad_enabled() and self.B.weight.requires_grad
        drops = self.training or self.dropout.training  # which may be on for Monte Carlo samples alone
        if drops or (not _is_recorded() and (trains or not cheaper)):
            return None
        return weight + self.weight()


class ConvLoRA(_ConvolutionLoRA):
    """A a convolution (G r, inputs / G, *kernel) placed as the layer, B (outputs, r) of 1x1x1."""

    def __init__(self, layer: Any, rank: int, scale: float, dropout: float, gaussian: bool) -> None:
        kind, inner = CONVOLUTIONS[len(layer.kernel_size) - 1], layer.groups * rank
        down = kind(
            layer.in_channels,
            inner,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            bias=False,
            padding_mode=layer.padding_mode,
        )
        up = kind(inner, layer.out_channels, 1, groups=layer.groups, bias=False)
        super().__init__(layer, rank, scale, dropout, (down, up))
        self.initialise(down.weight.data, up.weight.data, gaussian)

    def weight(self) -> Tensor:
        down = self.A.weight.flatten(1).unflatten(0, [self.groups, -1])  # (G, r, inputs / G * kernel)
        up = self.B.weight.flatten(1).unflatten(0, [self.groups, -1])  # (G, outputs / G, r)
        return self.scale * (up @ down).flatten(0, 1).unflatten(1, self.A.weight.shape[1:])


class TransposedLoRA(_ConvolutionLoRA):
    """Of a transposed one: A (G r, inputs / G) of 1x1x1, B transposed (G r, outputs / G, *kernel)."""

    def __init__(self, layer: Any, rank: int, scale: float, dropout: float, gaussian: bool) -> None:
        dims, inner = len(layer.kernel_size), layer.groups * rank
        down = CONVOLUTIONS[dims - 1](layer.in_channels, inner, 1, groups=layer.groups, bias=False)
        up = TRANSPOSED[dims - 1](
            inner,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.output_padding,
            layer.groups,
            bias=False,
            dilation=layer.dilation,
        )
        super().__init__(layer, rank, scale, dropout, (down, up))
        self.initialise(down.weight.data, up.weight.data, gaussian)

    def weight(self) -> Tensor:
        down = self.A.weight.flatten(1).unflatten(0, [self.groups, -1])  # (G, r, inputs / G)
        up = self.B.weight.flatten(1).unflatten(0, [self.groups, -1])  # (G, r, outputs / G * kernel)
        return self.scale * (down.mT @ up).flatten(0, 1).unflatten(1, self.B.weight.shape[1:])


class DoRADelta(Delta):
    """Low-rank factors with a trained length for each output: W = m (W0 + g B A) / |W0 + g B A|, row by row.

    m starts at the length of the rows of W0, so that nothing changes at first. The length in the denominator is not
    differentiated, as in the paper (section 4.3).
    """

    tag = "dora"

    def __init__(self, layer: nn.Module, factors: LoRADelta) -> None:
        super().__init__()
        self.factors = factors
        self.layer = [layer]  # a list, so that it is no submodule
        self.touched: Tensor
        self.register_buffer("touched", factors.rows(layer).to(self._weight().device), persistent=False)
        self.magnitude = nn.Parameter(_lengths(layer, self._weight().detach())[self.touched])

    @torch.no_grad()
    def reset(self, layer: nn.Module) -> None:
        self.magnitude.copy_(_lengths(layer, self._weight())[self.touched])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.factors(x, y)
        layer = self.layer[0]
        with torch.no_grad():
            lengths = _lengths(layer, self._weight().to(self.magnitude.device) + self.factors.weight())
        shape = (-1, *[1] * (self._weight().ndim - 2))  # channels come before the voxels
        stretch = (self._stretch(lengths) - 1).view(shape)  # zero where nothing is trained
        bias = 0 if layer.bias is None else cast(Tensor, layer.bias).to(z.device).view(shape)
        return (z + stretch * (z - bias)).to(z.dtype)  # under autocast the sum is in float32

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Trained lengths of all rows (outputs,); those that are not touched keep theirs."""
        return _lengths(self.layer[0], self._weight()).index_copy(0, self.touched, self.magnitude)

    def _weight(self) -> Tensor:
        return cast(Tensor, self.layer[0].weight)

    def _stretch(self, lengths: Tensor) -> Tensor:
        tiny = torch.finfo(lengths.dtype).tiny  # rows of zeros stay zero
        ratio = self.magnitude.to(lengths.dtype) / lengths[self.touched].clamp_min(tiny)
        return torch.ones_like(lengths).index_copy(0, self.touched, ratio)

    def merged_parameters(self, layer: nn.Module) -> dict[str, Tensor]:
        weight = self.factors.merged_parameters(layer)["weight"]
        stretch = self._stretch(_lengths(layer, weight))
        return {"weight": _from_rows(layer, torch.einsum("o,o...->o...", stretch, _by_rows(layer, weight)))}


def lora_delta(
    site: Site, rank: int, scale: float, dropout: float, gaussian: bool, shared_a: bool, dora: bool
) -> Delta:
    """The delta for one layer."""
    layer, delta = site.layer, cast(LoRADelta, None)
    if isinstance(layer, nn.Linear) and site.slots and not shared_a:
        delta = FusedLoRA(layer, site.slots, rank, scale, dropout, gaussian)
    elif isinstance(layer, nn.Linear):
        delta = LinearLoRA(layer, rank, scale, dropout, gaussian)
    elif isinstance(layer, CONVOLUTIONS):
        delta = ConvLoRA(layer, rank, scale, dropout, gaussian)
    else:
        delta = TransposedLoRA(layer, rank, scale, dropout, gaussian)
    delta.to(next(layer.parameters()))
    return DoRADelta(layer, delta) if dora else delta


def largest_rank(site: Site, shared_a: bool = False) -> int:
    """Rank of the layer's weight at most: the smaller of its inputs (times kernel) and its outputs, a group or slot."""
    layer: Any = site.layer
    if isinstance(layer, nn.Linear):
        return min(layer.in_features, layer.out_features // (3 if site.slots and not shared_a else 1))
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    kernel = math.prod(layer.kernel_size)
    return min(inputs, outputs * kernel) if layer.transposed else min(inputs * kernel, outputs)


def _add_product(y: Tensor, inner: Tensor, up: Tensor, scale: float) -> Tensor:
    """y + scale * inner up^T, in one pass over y."""
    flat = y.reshape(-1, y.shape[-1])
    return torch.addmm(flat, inner.reshape(-1, inner.shape[-1]), up.mT, alpha=scale).view_as(y)


_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 has none


def _is_recorded() -> bool:
    """Whether a graph is made of the network, which is to depend neither on gradients nor on the size of images."""
    return False if torch.jit.is_scripting() else torch.jit.is_tracing() or _is_exporting()


def _by_rows(layer: Any, weight: Tensor) -> Tensor:
    """The weight with outputs first (outputs, inputs, *kernel)."""
    if isinstance(layer, TRANSPOSED):
        return rearrange(weight, "(g i) o ... -> (g o) i ...", g=layer.groups)
    return weight


def _from_rows(layer: Any, rows: Tensor) -> Tensor:
    if isinstance(layer, TRANSPOSED):
        return rearrange(rows, "(g o) i ... -> (g i) o ...", g=layer.groups)
    return rows


def _lengths(layer: nn.Module, weight: Tensor) -> Tensor:
    return _by_rows(layer, weight).flatten(1).norm(dim=1)
