"""Visual prompt tuning: trained tokens that the attention of a frozen transformer reads.

M. Jia et al., "Visual Prompt Tuning", arXiv:2203.12119 (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from monai.networks.nets.swin_unetr import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from monai_petl.core.deltas import Delta, add_delta
from monai_petl.core.method import Method
from monai_petl.core.roles import transformer_blocks, vision_transformers
from monai_petl.methods.parts.foreign_attention import require_known_blocks

__all__ = ["VPT"]


class PromptDelta(Delta):
    """Prompt tokens (P, C) at one block. They start uniform within sqrt(3 / C), the paper's bound for a ViT-B/16."""

    tag = "vpt"

    def __init__(self, tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        bound = math.sqrt(3 / width)
        self.tokens = nn.Parameter(torch.empty(tokens, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()


class BlockPrompts(PromptDelta):
    """Of one block of a ViT: the tokens join those of the image.

    Args:
        tokens, width, dropout: see :class:`PromptDelta`.
        stream: where the next block takes what becomes of them; without it they are dropped behind this one.
    """

    def __init__(self, tokens: int, width: int, dropout: float, stream: list[Tensor] | None = None) -> None:
        super().__init__(tokens, width, dropout)
        self.stream = stream

    def around(self, block: nn.Module, run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        prompts = self.dropout(self.tokens).expand(len(x), -1, -1)
        y = run(torch.cat((x, prompts.to(x)), 1), *args, **kwargs)
        if self.stream is not None:
            self.stream[:] = [y[:, x.shape[1] :]]
        return y[:, : x.shape[1]]


class Carried(Delta):
    """One block of a ViT through which the tokens of an earlier one pass; they leave the blocks apart from the image's.

    Args:
        stream: a list that all blocks of a transformer share; it holds the tokens between two of them, else nothing.
        hands_on: whether the next block takes them over.
    """

    tag = "vptpass"

    def __init__(self, stream: list[Tensor], hands_on: bool) -> None:
        super().__init__()
        self.stream, self.hands_on = stream, hands_on

    def around(self, block: nn.Module, run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = run(torch.cat((x, self.stream.pop()), 1), *args, **kwargs)
        if self.hands_on:
            self.stream.append(y[:, x.shape[1] :])
        return y[:, : x.shape[1]]


class WindowPrompts(PromptDelta):
    """Of one block of a Swin transformer: keys and values that every window reads besides its own.

    They pass the block's norm and projection as the image's tokens do. What becomes of them is not computed: it is
    dropped behind the block, and no token of the image depends on it.
    """

    def __init__(self, tokens: int, width: int, dropout: float, norm: nn.Module) -> None:
        super().__init__(tokens, width, dropout)
        self.norm = [norm]  # the block's, a list so that it is no submodule here

    def around(self, block: nn.Module, run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attention, mask = cast(WindowAttention, block), (args[0] if args else kwargs.get("mask"))
        b, n, c = x.shape
        heads = attention.num_heads
        q, k, v = attention.qkv(x).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (B', heads, N, C / heads) each
        deltas = cast(Any, attention).deltas.values()
        prompted = [
            d for d in deltas if isinstance(d, WindowPrompts) and d.active
        ]  # of all adapters; only the last runs
        tokens = torch.cat([d.dropout(d.tokens) for d in prompted])
        prompts = attention.qkv(self.norm[0](tokens)).view(-1, 3, heads, c // heads)
        _, key, value = prompts.permute(1, 2, 0, 3).to(q)  # (heads, P, C / heads) each
        index = cast(Tensor, attention.relative_position_index)[:n, :n]
        bias = attention.relative_position_bias_table[index.reshape(-1)].view(1, n, n, heads).permute(0, 3, 1, 2)
        if mask is not None:
            bias = bias + mask[:, None]  # (windows, heads, N, N)
        bias = F.pad(bias, (0, len(tokens))).to(q)  # prompts have no position

        def by_window(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (-1, len(bias)))

        out = F.scaled_dot_product_attention(
            by_window(q),
            by_window(torch.cat((k, key.expand(b, -1, -1, -1)), 2)),
            by_window(torch.cat((v, value.expand(b, -1, -1, -1)), 2)),
            attn_mask=bias,
            dropout_p=attention.attn_drop.p if attention.attn_drop.training else 0.0,
            scale=attention.scale,
        )
        y = attention.proj_drop(attention.proj(out.flatten(0, 1).transpose(1, 2).reshape(b, n, c)))
        for delta in deltas:  # those before this one, which ``run`` would have applied
            if delta is self:
                break
            if delta.active and not isinstance(delta, WindowPrompts):
                y = delta(x, y)
        return y


@dataclass(frozen=True)
class VPT(Method):
    """Trained tokens beside those of the image, in a ViT, UNETR or SwinUNETR. Cannot be merged.

    The start is not the identity: attention sees the tokens from the first step on.

    Args:
        num_tokens: P.
        deep: fresh tokens at every block (P C values each); else at the first block only.
        blocks: numbers of the blocks that get fresh tokens, from 0, in place of ``deep``. In a ViT tokens pass on to the blocks
            behind that get none; in windows they end with their block: windows would have to agree on one value.
        dropout: on the tokens, in training.

    Raises:
        TypeError: no transformer blocks, or attention with relative positions between all tokens (BEiT).
        ValueError: an argument is out of range.
    """

    num_tokens: int = 10
    deep: bool = True
    blocks: Sequence[int] | None = None
    dropout: float = 0.0

    def attach(self, network: nn.Module, name: str) -> None:
        if not isinstance(self.num_tokens, int) or self.num_tokens < 1:
            raise ValueError(f"num_tokens must be a whole number of at least 1, got {self.num_tokens!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        blocks = transformer_blocks(network)
        require_known_blocks(network, blocks)
        transformers = [n for n, _ in vision_transformers(network)]
        owners = [
            next((t for t in transformers if n.startswith(f"{t}." if t else "")), n.rpartition(".")[0])
            for n, _ in blocks
        ]
        fresh = self._fresh(owners)
        streams: dict[str, list[Tensor]] = {owner: [] for owner in owners}
        for place, (block_name, block) in enumerate(blocks):
            width, owner = block.norm1.normalized_shape[0], owners[place]
            if isinstance(block, SwinTransformerBlock):
                if place in fresh:
                    prompts = WindowPrompts(self.num_tokens, width, self.dropout, block.norm1)
                    add_delta(block.attn, prompts, name)
                continue
            if getattr(block.attn, "rel_positional_embedding", None) is not None or block.attn.causal:
                raise TypeError(
                    f"VPT cannot add tokens at {block_name}: its attention has relative positions or a causal order, in which "
                    "they have no place. Use LoRA(), VPETL() or FFNAdapter()"
                )
            hands_on = owner in owners[place + 1 :] and place + 1 not in fresh
            if place in fresh:
                stream = streams[owner] if hands_on else None
                add_delta(block, BlockPrompts(self.num_tokens, width, self.dropout, stream), name)
            elif any(earlier in fresh for earlier in range(owners.index(owner), place)):
                add_delta(block, Carried(streams[owner], hands_on), name)

    def _fresh(self, owners: Sequence[str]) -> list[int]:
        """Numbers of the blocks that get tokens, from the transformers that they belong to."""
        if self.blocks is None:
            return [place for place, owner in enumerate(owners) if self.deep or owner not in owners[:place]]
        if len({*self.blocks} & {*range(len(owners))}) < max(len(self.blocks), 1):
            raise ValueError(
                f"blocks must be different numbers of blocks, 0 to {len(owners) - 1}; got {list(self.blocks)}"
            )
        return list(self.blocks)
