"""Keys and values of a frozen transformer's most attended tokens: what FPT reads of it.

"Fine-grained Prompt Tuning" (Y. Huang et al., arXiv:2403.07576, MICCAI 2024; arXiv:2408.02426, IEEE TNNLS 36(9), 2025). A
block is tapped at the keys and values that it attends with itself; of each head the tokens are kept that all queries
together, or the class token, attend to most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.networks.blocks import SABlock
from monai.networks.nets import ViT
from torch import Tensor
from torch.nn import functional as F

from monai_petl.networks.vit.parts import first_tokens
from monai_petl.networks.vit.patches import patch_of

__all__ = ["SCORES", "Taps", "kept_tokens", "read_taps"]

SCORES = {"global": "the mean over all queries", "class_token": "the row of the class token"}
CHUNK = 2**21  # attention weights of an image that are there at once


@dataclass(frozen=True)
class Taps:
    """What is kept of tapped blocks.

    Attributes:
        keys, values: (L, B, heads, M, channels of a head), tokens in ascending order.
        index: the tokens, (L, B, heads, M), 0 being the class token.
        scores: how much each token is attended, (L, B, heads, N); those of a head sum to 1.
    """

    keys: Tensor
    values: Tensor
    index: Tensor
    scores: Tensor


@torch.no_grad()
@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def read_taps(
    vit: ViT,
    image: Tensor,
    blocks: Sequence[int],
    img_size: Sequence[int],
    token_ratio: float = 0.2,
    score: str = "global",
    resize_offset: float = 0.0,
) -> Taps:
    """Run a transformer up to its last tapped block, and keep what is attended most. Nothing is kept for a backward pass.

    It runs in float32 also under autocast: which tokens are kept must not depend on that.

    Args:
        vit: the frozen transformer, with a class token.
        image: (B, C, *size). What does not fill a patch is left out.
        blocks: numbers of the tapped blocks, ascending from 0.
        img_size: pixels that the transformer's positions are made for, see :func:`trained_size`.
        token_ratio: share of the tokens, class token included, that is kept.
        score: a key of :data:`SCORES`.
        resize_offset: see :func:`monai_petl.networks.vit.parts.resize_positions`.
    """
    patch, image = patch_of(vit.patch_embedding), image.float()
    size = [extent // side * side for extent, side in zip(image.shape[2:], patch, strict=True)]
    for axis, extent in enumerate(size, 2):
        image = image.narrow(axis, 0, extent)
    tokens, _ = first_tokens(vit, image, img_size, resize_offset)
    count, last, taps = kept_tokens(tokens.shape[1], token_ratio), blocks[-1], []
    for number, block in enumerate(vit.blocks[: last + 1]):
        q, k, v = block.attn.input_rearrange(block.attn.qkv(block.norm1(tokens)))  # (B, heads, N, channels of a head)
        if number in blocks:
            scores = _scores(block.attn, q, k, score)
            index = scores.topk(count).indices.sort().values
            rows = index[..., None].expand(*index.shape, k.shape[-1])
            taps.append((k.gather(2, rows), v.gather(2, rows), index, scores))
        if number < last:
            tokens = tokens + block.attn.out_proj(block.attn.out_rearrange(_read(block.attn, q, k, v)))
            tokens = tokens + block.mlp(block.norm2(tokens))
    return Taps(*map(torch.stack, zip(*taps, strict=True)))


def kept_tokens(tokens: int, token_ratio: float) -> int:
    """How many are kept, rounded down and at least 1."""
    return max(1, int(tokens * token_ratio))


def trained_size(vit: ViT, size: Sequence[int]) -> tuple[int, ...]:
    """Pixels that the table of positions was made for: ``size`` where it has as many places, else a square or a cube.

    Raises:
        ValueError: the table is of neither.
    """
    patch, count = patch_of(vit.patch_embedding), vit.patch_embedding.position_embeddings.shape[1]
    if math.prod(extent // side for extent, side in zip(size, patch, strict=True)) == count:
        return tuple(size)
    edge = round(count ** (1 / len(patch)))
    if edge ** len(patch) != count:
        raise ValueError(
            f"the backbone has {count} positions, which are no square or cube and do not fit an image of {tuple(size)}; give "
            "it images of the size that it was built for"
        )
    return tuple(edge * side for side in patch)


def _scores(attention: SABlock, q: Tensor, k: Tensor, score: str) -> Tensor:
    """How much each token is attended, (B, heads, N).

    Some queries at a time, so that there are never N x N weights of a large image at once.
    """
    heads, count = q.shape[1:3]
    whole = attention.rel_positional_embedding is not None  # a module on the weights takes all of them
    step = count if whole else max(1, CHUNK // (heads * count))
    scores = q.new_zeros(q.shape[:3])
    for queries in q.split(step, 2):
        weights = _weights(attention, queries, k)
        if score == "class_token":
            return weights[:, :, 0]
        scores += weights.sum(2) / count
    return scores


def _read(attention: SABlock, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What all tokens read, (B, heads, N, channels of a head); fused, which a module on the weights does not allow."""
    if attention.rel_positional_embedding is None:
        return F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    return _weights(attention, q, k) @ v


def _weights(attention: SABlock, q: Tensor, k: Tensor) -> Tensor:
    """Of some queries, (B, heads, queries, N)."""
    logits, hook = q @ k.mT * attention.scale, attention.rel_positional_embedding
    return (logits if hook is None else hook(None, logits, q)).softmax(-1)
