"""What a mask holds: recognition tokens that a frozen transformer's own deeper blocks read the image with.

"Side Adapter Network for Open-Vocabulary Semantic Segmentation" (M. Xu et al., arXiv:2302.12242), section 3.3. A token
starts as the class token and sees in each block all patches, with the attention bias of its mask, and itself, without;
neither the class token nor another token. The patches and the class token never see it, so their stream stays that of the
frozen transformer, and the tokens run beside it: N x (HW + 1) pairs in place of (N + HW + 1)^2, and the last block of the
stream need not run at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from monai.networks.blocks import SABlock, TransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from monai_petl.networks.vit.attention_bias import ClassKeyBias, RelativePositionBias

__all__ = ["STARTS", "Recognition", "read_regions"]

STARTS = {
    "cls": "the class token",
    "gap": "the mean of the patches",
    "learned": "a learned token for each query",
    "cls+learned": "the class token and a learned one",
    "gap+learned": "the mean of the patches and a learned token",
}
LARGEST_SCALE = 100.0  # of the cosines


class Recognition(nn.Module):
    """Where recognition tokens start, and class scores of where they end.

    Args:
        hidden_size: of the backbone.
        num_queries: N, for learned tokens.
        num_vectors: learned class vectors, no-object included where there is one.
        start: a key of :data:`STARTS`.
        out_size: of the class vectors; that of the backbone, or of a projection behind its norm.

    The scale of the cosines is learned; it begins at 1 / 0.07 and is at most 100.
    """

    def __init__(
        self, hidden_size: int, num_queries: int, num_vectors: int, start: str, out_size: int | None = None
    ) -> None:
        super().__init__()
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}; got {start!r}")
        out_size = out_size or hidden_size
        self.start = start
        self.tokens = nn.Parameter(0.02 * torch.randn(1, num_queries, hidden_size)) if "learned" in start else None
        self.vectors = nn.Parameter(out_size**-0.5 * torch.randn(num_vectors, out_size))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def begin(self, tokens: Tensor, patches: int, count: int) -> Tensor:
        """(B, count, hidden size), of the states (B, [1 +] patches, hidden size) before the deeper blocks."""
        learned = 0 if self.tokens is None else self.tokens
        first = tokens[:, :1] if self.start.startswith("cls") else tokens[:, -patches:].mean(1, keepdim=True)
        return (torch.zeros_like(first) if self.start == "learned" else first).expand(-1, count, -1) + learned

    def scores(self, embeddings: Tensor) -> Tensor:
        """Cosines with all class vectors, scaled: (B, N, size) -> (B, N, vectors)."""
        return self.scale() * F.normalize(embeddings, dim=-1) @ F.normalize(self.vectors, dim=-1).mT

    def presence(self, embeddings: Tensor) -> Tensor:
        """The cosine of each query with its own class vector, scaled: (B, N, size) -> (B, N)."""
        return self.scale() * F.cosine_similarity(embeddings, self.vectors, dim=-1)

    def scale(self) -> Tensor:
        """What cosines are multiplied with."""
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)


def read_regions(blocks: Sequence[TransformerBlock], tokens: Tensor, start: Tensor, bias: Tensor) -> list[Tensor]:
    """Recognition tokens through the deeper blocks of a frozen transformer.

    Args:
        blocks: the deeper blocks.
        tokens: states (B, [1 +] P, C) before them, with the class token or without.
        start: recognition tokens (B, N, C).
        bias: of their attention to the patches, (B, heads, N, P).

    Returns:
        The recognition tokens after every block, (B, N, C) each.
    """
    patches, found = bias.shape[-1], []
    for number, block in enumerate(blocks, 1):
        start = _read(block, tokens, start, bias, tokens.shape[1] - patches)
        found.append(start)
        if number < len(blocks):
            tokens = block(tokens)
    return found


def _read(block: TransformerBlock, tokens: Tensor, start: Tensor, bias: Tensor, leading: int) -> Tensor:
    attention = block.attn
    _, keys, values = _heads(attention, block.norm1(tokens))
    q, own_key, own_value = _heads(attention, block.norm1(start))  # (B, heads, N, channels of a head)
    own_bias, patch_bias = _class_bias(attention)
    seen = (q @ keys[:, :, leading:].mT) * attention.scale + bias + patch_bias
    itself = (q * own_key).sum(-1, keepdim=True) * attention.scale + own_bias
    weights = torch.cat((seen, itself), -1).softmax(-1)  # (B, heads, N, P + 1)
    read = weights[..., :-1] @ values[:, :, leading:] + weights[..., -1:] * own_value
    start = start + attention.drop_output(attention.out_proj(rearrange(read, "b h n c -> b n (h c)")))
    return start + block.mlp(block.norm2(start))


def _heads(attention: SABlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, heads, tokens, channels of a head)."""
    if attention.use_combined_linear:
        q, k, v = attention.input_rearrange(attention.qkv(x))
    else:
        q, k, v = (attention.input_rearrange(layer(x)) for layer in (attention.to_q, attention.to_k, attention.to_v))
    return q, k, v


def _class_bias(attention: SABlock) -> tuple[Tensor | float, Tensor | float]:
    """What the transformer adds to the class token's logits: on itself, and on the patches."""
    hook = attention.rel_positional_embedding
    if isinstance(hook, ClassKeyBias):
        return hook.value, 0.0
    if isinstance(hook, RelativePositionBias):
        row = hook.relative_position_bias_table[hook.index[0]].mT[:, None]  # (heads, 1, 1 + patches)
        return row[..., :1], row[..., 1:]
    return 0.0, 0.0
