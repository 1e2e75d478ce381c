"""The side network of SAN: a small vision transformer that reads the image and a frozen transformer's states.

"Side Adapter Network for Open-Vocabulary Semantic Segmentation" (M. Xu et al., arXiv:2302.12242, CVPR 2023), section 3.2. The
queries stand before the patches; positions are added again after every block but the last; what the frozen transformer knew
after quarters of its depth is added to the patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.blocks import Convolution, UpSample
from monai.networks.layers import Conv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from monai_petl.networks.san.recognition import Recognition
from monai_petl.networks.vit.backbone import set_eps
from monai_petl.networks.vit.parts import resize_positions, side_block, token_grid

__all__ = ["Level", "MaskHeads", "PixelUpsample", "SideNetwork"]

EPS = 1e-6  # of the layer norms


@dataclass(frozen=True)
class Level:
    """What one block of the side network says.

    Attributes:
        masks: logits (B, N, *fine grid).
        bias: on the attention logits of every head, (B, heads, N, *side grid); ``None`` without recognition.
    """

    masks: Tensor
    bias: Tensor | None


class SideNetwork(nn.Module):
    """Queries and patches through a small transformer, and what they say of masks.

    Args:
        in_channels: of the image.
        img_size: pixels or voxels that positions are made for.
        patch_size: of the side network; half the backbone's in the paper's proportions.
        hidden_size: of the backbone.
        num_queries: N.
        width: channels.
        depth: blocks, at least 3.
        num_heads: of each block.
        bias_heads: heads of the backbone that the attention bias is for.
        recognition: class vectors and the start of recognition tokens, kept here because they train with this network; without
            it there is no attention bias either.
        embed_dim: of query and pixel embeddings, and of the hidden layers of their MLPs.
        pixel_upsample: stages that double the resolution of the masks.
        use_checkpoint: compute activations of blocks and heads again in the backward pass, in place of keeping them.
    """

    beside_backbone = True  # methods that change a backbone leave this alone

    def __init__(
        self,
        in_channels: int,
        img_size: Sequence[int],
        patch_size: Sequence[int],
        hidden_size: int,
        num_queries: int,
        *,
        width: int = 240,
        depth: int = 8,
        num_heads: int = 6,
        bias_heads: int = 12,
        recognition: Recognition | None = None,
        embed_dim: int = 256,
        head_dim: int = 256,
        pixel_upsample: int = 0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if depth < 3:
            raise ValueError(
                f"the side network needs at least 3 blocks, between which four states are added; got {depth}"
            )
        self.patch_size, self.num_queries, self.use_checkpoint = tuple(patch_size), num_queries, use_checkpoint
        self.trained_grid = token_grid(img_size, patch_size)
        self.patch_embedding = Conv["conv", len(patch_size)](in_channels, width, self.patch_size, self.patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn(1, math.prod(self.trained_grid), width))
        self.queries = nn.Parameter(0.02 * torch.randn(1, num_queries, width))
        self.query_positions = nn.Parameter(0.02 * torch.randn(1, num_queries, width))
        self.blocks = nn.ModuleList(side_block(width, num_heads) for _ in range(depth))
        self.fusions = nn.ModuleList(_fusion(hidden_size, width) for _ in range(4))
        upsample = (
            PixelUpsample(in_channels, head_dim, img_size, self.trained_grid, pixel_upsample)
            if pixel_upsample
            else None
        )
        self.heads = MaskHeads(width, bias_heads if recognition else 0, embed_dim, head_dim, upsample)
        self.recognition = recognition
        set_eps(self, EPS)

    def forward(self, image: Tensor, states: Sequence[Tensor], levels: int = 1) -> list[Level]:
        """
        Args:
            image: (B, C, *size).
            states: four states of the backbone's patches, (B, hidden size, *grid), the shallowest first.
            levels: how many of the last blocks speak, 1 or 2.

        Returns:
            What they say, the last block first.
        """
        patches = self.patch_embedding(image)
        grid = token_grid(image.shape[2:], self.patch_size)
        positions = torch.cat((self.query_positions, resize_positions(self.positions, self.trained_grid, grid)), 1)
        tokens = torch.cat((self.queries.expand(image.shape[0], -1, -1), patches.flatten(2).mT), 1) + positions
        tokens = self._fused(tokens, 0, states, grid)
        spoken = []
        for number, block in enumerate(self.blocks, 1):
            tokens = self._through(block, tokens)
            if number < len(self.fusions):
                tokens = self._fused(tokens, number, states, grid)
            if number > len(self.blocks) - levels:
                queries, patched = tokens.split((self.num_queries, tokens.shape[1] - self.num_queries), 1)
                spoken.append(self._through(self.heads, queries, patched, grid, image))
            if number < len(self.blocks):
                tokens = tokens + positions
        return spoken[::-1]

    def _through(self, part: nn.Module, *inputs: Any) -> Any:
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def _fused(self, tokens: Tensor, number: int, states: Sequence[Tensor], grid: tuple[int, ...]) -> Tensor:
        """With a state of the backbone added to the patches; the queries stay as they are."""
        added = self.fusions[number](states[number].movedim(1, -1)).movedim(-1, 1)  # (B, width, *grid of the backbone)
        if added.shape[2:] != grid:
            added = F.interpolate(added, grid, mode="bilinear" if len(grid) == 2 else "trilinear")
        queries, patches = tokens.split((self.num_queries, tokens.shape[1] - self.num_queries), 1)
        return torch.cat((queries, patches + added.flatten(2).mT), 1)


class MaskHeads(nn.Module):
    """Masks and attention biases: products of query embeddings with pixel embeddings.

    The last layers of the pixel and bias MLPs are linear, so they are applied to the few queries in place of the many
    pixels: the products are the same.

    Args:
        width: of the tokens.
        bias_heads: heads of the backbone; 0 for no attention bias.
        embed_dim: of the embeddings.
        head_dim: of the hidden layers.
        upsample: what makes pixel embeddings finer, in front of the last layer of their MLP.
    """

    def __init__(
        self,
        width: int,
        bias_heads: int,
        embed_dim: int = 256,
        head_dim: int = 256,
        upsample: PixelUpsample | None = None,
    ) -> None:
        super().__init__()
        self.bias_heads = bias_heads
        self.query = MLP(width, head_dim, embed_dim)
        self.upsample = upsample
        self.pixel = MLP(width, head_dim, embed_dim, last=upsample.out_channels if upsample else None)
        self.bias: MLP | None = None
        if bias_heads:
            self.bias = MLP(width, head_dim, bias_heads * embed_dim)  # channel = head * embed_dim + place
            self.bias_affine = nn.Linear(1, 1)  # an identity at first, where the published one has a random sign
            with torch.no_grad():
                self.bias_affine.weight.fill_(1.0)
                self.bias_affine.bias.fill_(0.0)

    def forward(self, queries: Tensor, patches: Tensor, grid: tuple[int, ...], image: Tensor) -> Level:
        """
        Args:
            queries: (B, N, width).
            patches: (B, P, width) on the grid.
            grid: of the patches.
            image: (B, C, *size).
        """
        embedded = self.query(queries)  # (B, N, embed_dim)
        pixels = self.pixel.hidden(patches).mT.unflatten(2, grid)  # (B, head_dim, *grid)
        pixels = self.upsample(pixels, image) if self.upsample else pixels
        last = self.pixel.last
        masks = (embedded @ last.weight) @ pixels.flatten(2) + (embedded @ last.bias)[..., None]
        bias = None if self.bias is None else self._bias(self.bias, embedded, patches, grid)
        return Level(masks.unflatten(2, pixels.shape[2:]), bias)

    def _bias(self, mlp: MLP, embedded: Tensor, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        hidden, last = mlp.hidden(patches), mlp.last  # (B, P, head_dim)
        weight = last.weight.unflatten(0, (self.bias_heads, -1))  # (heads, embed_dim, head_dim)
        steered = embedded[:, None] @ weight  # (B, heads, N, head_dim)
        offset = embedded @ last.bias.unflatten(0, (self.bias_heads, -1)).mT  # (B, N, heads)
        bias = steered @ hidden.mT[:, None] + offset.mT[..., None]  # (B, heads, N, P)
        return (bias * self.bias_affine.weight[0, 0] + self.bias_affine.bias).unflatten(3, grid)


class MLP(nn.Module):
    """Three linear layers, the last one by itself; ``last`` are its inputs where something comes in between."""

    def __init__(self, width: int, hidden: int, out: int, last: int | None = None) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.last = nn.Linear(last or hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x))


class PixelUpsample(nn.Module):
    """Pixel embeddings at a finer grid: stages of half the channels, doubled resolution and a convolution.

    At the last stage what a convolution sees in the image itself is added: patches of eight voxels cannot tell where an
    organ ends.

    Args:
        in_channels: of the image.
        width: channels that come in; halved by each stage, down to 64 at least.
        img_size: pixels or voxels of the image.
        grid: of the pixel embeddings.
        stages: how many; an axis is not made finer than the image.
    """

    def __init__(self, in_channels: int, width: int, img_size: Sequence[int], grid: Sequence[int], stages: int) -> None:
        super().__init__()
        dims, fine = len(grid), tuple(grid)
        self.ups, self.convs = nn.ModuleList(), nn.ModuleList()
        for _ in range(stages):
            factor = tuple(2 if 2 * g <= extent else 1 for g, extent in zip(fine, img_size, strict=True))
            fine = tuple(g * f for g, f in zip(fine, factor, strict=True))
            narrow = max(width // 2, min(width, 64))
            up: nn.Module = UpSample(
                dims, width, narrow, factor, mode="nontrainable", interp_mode="linear", align_corners=False
            )
            conv: nn.Module = Convolution(dims, narrow, narrow, kernel_size=3, act="GELU", norm="INSTANCE", bias=False)
            self.ups.append(up)
            self.convs.append(conv)
            width = narrow
        self.out_channels = width
        steps = tuple(extent // g for extent, g in zip(img_size, fine, strict=True))
        self.stem = Conv["conv", dims](in_channels, width, 3, steps, padding=1)

    def forward(self, pixels: Tensor, image: Tensor) -> Tensor:
        """(B, width, *grid) -> (B, out_channels, *finer grid)."""
        for number, (up, conv) in enumerate(zip(self.ups, self.convs, strict=True), 1):
            pixels = up(pixels)
            pixels = conv(pixels + self._seen(image, pixels.shape[2:]) if number == len(self.ups) else pixels)
        return pixels

    def _seen(self, image: Tensor, size: Sequence[int]) -> Tensor:
        """The image as the stem sees it, at the grid's resolution."""
        seen = self.stem(image)
        return seen if seen.shape[2:] == tuple(size) else F.interpolate(seen, tuple(size), mode="area")


def _fusion(hidden_size: int, width: int) -> nn.Sequential:
    norm, projection = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width)
    nn.init.xavier_uniform_(projection.weight)
    nn.init.zeros_(projection.bias)
    return nn.Sequential(norm, projection)
