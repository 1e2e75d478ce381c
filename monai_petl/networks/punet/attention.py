"""Window attention whose queries are voxels and whose keys are voxels and prompt tokens.

M. Fischer, A. Bartler, B. Yang, "Prompt Tuning for Parameter-efficient Medical Image Segmentation", arXiv:2211.09233 (2022):
pre-norm attention with heterogeneous bias scores. Token rows are never queries, so the keys and values of the tokens do
not depend on the image. Two things differ from the published code on purpose, and `published_attention.py` has the
original arithmetic: keys and values are projected from the normalised input (the original projects the projected
queries), and excluded scores count as nothing (the original multiplies scores by an inverted mask).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from monai_petl.networks.punet.prompts import xavier_parameter
from monai_petl.networks.punet.windows import WindowPlan

MOST_PLANS = 8

__all__ = ["AttentionPrompt", "PromptAttention", "WindowAttention"]


@dataclass(frozen=True)
class AttentionPrompt:
    """Keys and values (U, heads, T, C/heads) of the tokens of U classes in one sub-block, and their bias (U, heads, T)."""

    key: Tensor
    value: Tensor
    bias: Tensor

    def select(self, rows: Tensor) -> AttentionPrompt:
        """One row for each batch element; a single row stays as it is and serves all of them."""
        if self.bias.shape[0] == 1:
            return self
        return AttentionPrompt(self.key[rows], self.value[rows], self.bias[rows])

    @classmethod
    def empty(cls, like: Tensor) -> AttentionPrompt:
        """No tokens, for content (..., heads, C/heads)."""
        key = like.new_zeros(1, like.shape[-2], 0, like.shape[-1])
        return cls(key, key, key[..., 0])


class PromptAttention(nn.Module):
    """One attention sub-block: attention over a window and its prompt tokens, then a linear layer, both with residuals.

    Args:
        channels: width C.
        num_heads: number of heads; must divide ``channels``.
        window_size: configured window (h, w, d) in voxels; sizes the relative-position tables.
        bias_width: width E of the relative-position tables.
        mlp_ratio: 1 for the single linear layer of the paper; larger for a two-layer perceptron with GELU.
    """

    def __init__(
        self, channels: int, num_heads: int, window_size: Sequence[int], *, bias_width: int = 32, mlp_ratio: float = 1.0
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide the number of channels, got channels={channels}")
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5
        self.mark_scale = 2.0 ** math.ceil(-math.log2(self.scale))  # undoes the scale; a power of two keeps marks exact
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = _mlp(channels, mlp_ratio)
        self.adapter: nn.Module | None = None
        self.adapter_enabled = True
        for axis, extent in zip("hwd", window_size, strict=True):
            self.register_parameter(f"relative_table_{axis}", xavier_parameter(2 * extent - 1, bias_width))
            self.register_parameter(f"relative_head_{axis}", xavier_parameter(num_heads, bias_width))

    def forward(self, x: Tensor, plan: WindowPlan, prompt: AttentionPrompt | None = None) -> Tensor:
        """(B, H, W, D, C) -> (B, H, W, D, C); ``prompt`` has one row for each batch element."""
        x = x + self.out(self.attend(self.norm(x), plan, prompt))
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        """The second half of the sub-block: linear layer, and the bottleneck adapter where one is attached."""
        x = x + self.mlp(self.mlp_norm(x))
        return x + self.adapter(x) if self.adapter is not None and self.adapter_enabled else x

    def project_tokens(self, tokens: Tensor, bias: Tensor) -> AttentionPrompt:
        """Tokens (U, T, C) and their bias (U, heads, T) -> keys and values, which no image changes."""
        _, weight_k, weight_v = self.qkv.weight.chunk(3)
        normed = self.norm(tokens)
        key, value = (self._heads(F.linear(normed, weight)) for weight in (weight_k, weight_v))
        return AttentionPrompt(key, value, bias)

    def attend(self, normed: Tensor, plan: WindowPlan, prompt: AttentionPrompt | None) -> Tensor:
        """Normalised content (B, H, W, D, C) -> attended values (B, H, W, D, C), before the output projection."""
        windows = plan.to_windows(normed)  # (B, P, N, C)
        query, key, value = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # (B, P, N, h, c)
        bias = self.relative_bias(plan.window)
        if prompt is None:
            prompt = AttentionPrompt.empty(key)
        only_tokens_train = prompt.bias.requires_grad and not bias.requires_grad
        if plan.is_open and prompt.bias.shape[0] == 1 and not only_tokens_train:
            bias = torch.cat([prompt.bias[0, :, None].expand(-1, bias.shape[1], -1), bias], -1)
        else:
            query, key, value, prompt = self._marked(query, key, value, plan, prompt)
            bias = F.pad(bias, (prompt.key.shape[2], 0))
        out = _attention(
            query.flatten(0, 1).transpose(1, 2),
            _prepend(prompt.key, key).flatten(0, 1).transpose(1, 2),
            _prepend(prompt.value, value).flatten(0, 1).transpose(1, 2),
            bias,
            self.scale,
        )
        out = out.transpose(1, 2)[..., : self.qkv.in_features // self.num_heads]  # (B * P, N, h, c)
        return plan.merge(out.reshape(windows.shape))

    def _marked(
        self, query: Tensor, key: Tensor, value: Tensor, plan: WindowPlan, prompt: AttentionPrompt
    ) -> tuple[Tensor, Tensor, Tensor, AttentionPrompt]:
        """The same with a few channels more, whose products are the mask of the plan and the bias of the tokens.

        For masks that differ between windows, for biases that differ between images, and for training the latter while the
        attention stays fused: fused attention takes one bias matrix for all, and has no gradient for it.
        """
        width = query.shape[-1] + plan.query_marks.shape[-1]
        width += -width % 8  # fused attention is fastest at multiples of 8
        token_key = torch.cat([prompt.key, prompt.bias[..., None] / self.scale], -1)  # meets the constant mark
        prompt = AttentionPrompt(_widen(token_key, width), _widen(prompt.value, width), prompt.bias)
        query, key = (
            torch.cat([x, _widen(marks.to(x.dtype), width - x.shape[-1]).expand(*x.shape[:-1], -1)], -1)
            for x, marks in ((query, plan.query_marks), (key, plan.key_marks * self.mark_scale))
        )
        return query, key, _widen(value, width), prompt

    def relative_bias(self, window: Sequence[int]) -> Tensor:
        """Content-to-content bias (heads, N, N) of a window of N voxels: one third of the sum over the three axes."""
        total = self.norm.weight.new_zeros(())
        for axis, name in enumerate("hwd"):
            table, head = getattr(self, f"relative_table_{name}"), getattr(self, f"relative_head_{name}")
            scores = head @ table.T * (table.shape[1] ** -0.5 / 3)  # (heads, 2 * window - 1)
            position = torch.arange(window[axis], device=table.device)
            index = position[None, :] - position[:, None] + (table.shape[0] - 1) // 2  # key - query
            shape = [-1, 1, 1, 1, 1, 1, 1]
            shape[1 + axis] = shape[4 + axis] = window[axis]
            total = total + scores[:, index].view(shape)
        return total.reshape(self.num_heads, window[0] * window[1] * window[2], -1)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "... t (h c) -> ... h t c", h=self.num_heads)


class WindowAttention(nn.Module):
    """A plain and a shifted attention sub-block on a feature map (the paper's prompt-able shifted-window block).

    Args:
        channels, num_heads, window_size, bias_width, mlp_ratio: as for :class:`PromptAttention`.
        partition: ``"grid"`` or ``"block"``, see :class:`monai_petl.networks.punet.windows.WindowPlan`.
    """

    attention: type[PromptAttention] = PromptAttention

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: Sequence[int],
        *,
        partition: str,
        bias_width: int = 32,
        mlp_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.window_size = tuple(window_size)
        self.partition = partition
        self._plans: dict[tuple, tuple[WindowPlan, WindowPlan]] = {}
        self.attn0 = self.attention(channels, num_heads, window_size, bias_width=bias_width, mlp_ratio=mlp_ratio)
        self.attn1 = self.attention(channels, num_heads, window_size, bias_width=bias_width, mlp_ratio=mlp_ratio)

    def forward(self, x: Tensor, prompts: tuple[AttentionPrompt, AttentionPrompt] | None = None) -> Tensor:
        """(B, C, H, W, D) -> the same shape; ``prompts`` for the two sub-blocks, one row for each batch element."""
        plain, shifted = self.plans(x.shape[2:], x.device)
        x = x.permute(0, 2, 3, 4, 1).contiguous()  # no copy for channels-last feature maps
        x = self.attn0(x, plain, None if prompts is None else prompts[0])
        x = self.attn1(x, shifted, None if prompts is None else prompts[1])
        return x.permute(0, 4, 1, 2, 3)

    def project_tokens(self, tokens: Tensor, bias: Tensor) -> tuple[AttentionPrompt, AttentionPrompt]:
        """Tokens (U, 2, T, C) and bias (U, 2, heads, T) of U classes -> prompts of the two sub-blocks."""
        return (
            self.attn0.project_tokens(tokens[:, 0], bias[:, 0]),
            self.attn1.project_tokens(tokens[:, 1], bias[:, 1]),
        )

    def plans(self, size: Sequence[int], device: torch.device) -> tuple[WindowPlan, WindowPlan]:
        """The plans of the two sub-blocks for a feature map of this size, made at the first call."""
        key = (*size, device)
        if key not in self._plans:
            if len(self._plans) >= MOST_PLANS:  # serving images of any size must not fill the memory
                self._plans.pop(next(iter(self._plans)))
            make = [WindowPlan(size, self.window_size, self.partition, shifted, device) for shifted in (False, True)]
            self._plans[key] = (make[0], make[1])
        return self._plans[key]


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention (W, h, N, c) over keys and values (W, h, M, c) with one bias (h, N, M) for all windows."""
    bias = bias.to(query.dtype)
    if bias.requires_grad:  # no fused attention; the formula is faster than what torch falls back to
        scores = (query * scale) @ key.mT
        scores += bias
        return scores.softmax(-1) @ value
    mask = bias.expand(query.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _widen(x: Tensor, channels: int) -> Tensor:
    return F.pad(x, (0, channels - x.shape[-1]))


def _prepend(tokens: Tensor, content: Tensor) -> Tensor:
    """Token rows (B, h, T, c) in front of the content rows (B, P, N, h, c) of every window."""
    tokens = tokens.transpose(1, 2)[:, None].to(content.dtype)
    return torch.cat([tokens.expand(*content.shape[:2], -1, -1, -1), content], 2)


def _mlp(channels: int, ratio: float) -> nn.Module:
    if ratio == 1:
        return nn.Linear(channels, channels)
    hidden = int(channels * ratio)
    return nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
