"""The attention of PUNet with the arithmetic of its published code, for numerical parity with the paper's network.

M. Fischer, A. Bartler, B. Yang, arXiv:2211.09233 (2022). The parameters are those of :mod:`prompt_attention`; what is
computed from them differs: keys and values are projections of the *projected* query; the shifted sub-block multiplies
its scores by a mask that is 0 inside a region and 1 between regions; windows are strided grids; when any axis needs
padding, every axis gets some, with the larger half in front, while mask and crop count from the smaller half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from monai_petl.networks.punet.attention import AttentionPrompt, PromptAttention, WindowAttention
from monai_petl.networks.punet.windows import effective_window

__all__ = ["PublishedAttention", "PublishedPlan", "PublishedWindowAttention"]


class PublishedPlan:
    """Strided-grid partition of one volume size, with the published padding and mask (P, N, N) of zeros and ones."""

    def __init__(self, size: Sequence[int], window_size: Sequence[int], shifted: bool, device: torch.device) -> None:
        self.size = tuple(size)
        self.window, shift = effective_window(size, window_size)
        self.shift = shift if shifted else [0, 0, 0]
        low, high = [0, 0, 0], [0, 0, 0]
        if any(extent % w for extent, w in zip(size, self.window, strict=True)):
            amount = [w - extent % w for extent, w in zip(size, self.window, strict=True)]
            if self.window[2] == 1:
                amount[2] = 0
            low, high = [a // 2 for a in amount], [a - a // 2 for a in amount]
        self.low = low
        self.pad = [high[2], low[2], high[1], low[1], high[0], low[0]]
        self.padded = [extent + a + b for extent, a, b in zip(size, low, high, strict=True)]
        self.counts = [p // w for p, w in zip(self.padded, self.window, strict=True)]
        self.mask = self._mask(device) if shifted else None

    def partition(self, x: Tensor) -> Tensor:
        """(B, H, W, D, C) of the padded size -> windows (B, P, N, C)."""
        a, b, c = self.window
        return rearrange(x, "n (a h) (b w) (c d) f -> n (h w d) (a b c) f", a=a, b=b, c=c)

    def merge(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`partition`."""
        (a, b, c), (h, w, d) = self.window, self.counts
        return rearrange(x, "n (h w d) (a b c) f -> n (a h) (b w) (c d) f", a=a, b=b, c=c, h=h, w=w, d=d)

    def _mask(self, device: torch.device) -> Tensor:
        codes = torch.zeros(1, *self.padded, 1, device=device)
        regions = [
            (slice(0, -w), slice(-w, -s if s else 0), slice(-s, None) if s else slice(0, None))
            for w, s in zip(
                self.window, (w // 2 if s else 0 for w, s in zip(self.window, self.shift, strict=True)), strict=True
            )
        ]
        code = 0
        for h in regions[0]:
            for w in regions[1]:
                for d in regions[2]:
                    codes[:, h, w, d] = code
                    code += 1
        if any(self.pad):
            box = [slice(a, a + extent) for a, extent in zip(self.low, self.size, strict=True)]
            codes[:, box[0], box[1], box[2]] = code
        flat = self.partition(codes)[0, :, :, 0]  # (P, N)
        return (flat[:, :, None] != flat[:, None, :]).float()


class PublishedAttention(PromptAttention):
    """Attention sub-block that follows the published formulas step by step."""

    def project_tokens(self, tokens: Tensor, bias: Tensor) -> AttentionPrompt:
        _, key, value = self._chained_projections(self.norm(tokens))
        return AttentionPrompt(self._heads(key), self._heads(value), bias)

    def windows(self, x: Tensor, plan: PublishedPlan, prompt: AttentionPrompt | None) -> Tensor:
        """Windows (B, P, N, C) -> (B, P, N, C)."""
        query, key, value = (self._heads(t) for t in self._chained_projections(self.norm(x)))  # (B, P, h, N, c)
        scores = query @ key.mT * self.scale + self.relative_bias(plan.window)
        if plan.mask is not None:
            scores = scores * plan.mask[:, None]
        if prompt is not None:
            token_scores = query @ prompt.key[:, None].mT * self.scale + prompt.bias[:, None, :, None]
            scores = torch.cat([token_scores, scores], -1)
            value = torch.cat([prompt.value[:, None].expand(*value.shape[:2], -1, -1, -1), value], 3)
        out = rearrange(scores.softmax(-1) @ value, "b p h n c -> b p n (h c)")
        return self.finish(x + self.out(out))

    def _chained_projections(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight_q, weight_k, weight_v = self.qkv.weight.chunk(3)
        query = F.linear(normed, weight_q)
        return query, F.linear(query, weight_k), F.linear(query, weight_v)


class PublishedWindowAttention(WindowAttention):
    """Plain and shifted sub-block with the published padding, partition, mask and order of operations."""

    attention = PublishedAttention

    def forward(self, x: Tensor, prompts: tuple[AttentionPrompt, AttentionPrompt] | None = None) -> Tensor:
        plain, shifted = (PublishedPlan(x.shape[2:], self.window_size, flag, x.device) for flag in (False, True))
        first, second = (None, None) if prompts is None else prompts
        attn0, attn1 = cast(PublishedAttention, self.attn0), cast(PublishedAttention, self.attn1)
        x = F.pad(x, plain.pad).permute(0, 2, 3, 4, 1)
        x = plain.merge(attn0.windows(plain.partition(x), plain, first))
        x = x.roll([-s for s in shifted.shift], (1, 2, 3))
        x = shifted.merge(attn1.windows(shifted.partition(x), shifted, second))
        x = x.roll(shifted.shift, (1, 2, 3))
        (h, w, d), (i, j, k) = plain.size, plain.low
        return x[:, i : i + h, j : j + w, k : k + d].permute(0, 4, 1, 2, 3)
