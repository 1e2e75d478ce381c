"""PUNet's forward pass written down literally from the formulas of its paper, as a yardstick for speed.

M. Fischer, A. Bartler, B. Yang, arXiv:2211.09233 (2022). It uses the weights of a :class:`PUNet` with published
arithmetic and gives the same numbers, but does what a plain transcription does: 3D convolutions on volumes of depth one,
token rows that are queries as well and are thrown away, explicit scores and softmax, nothing kept between calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from monai_petl.networks import PUNet
from monai_petl.networks.punet.attention import PromptAttention
from monai_petl.networks.punet.published_attention import PublishedPlan


def literal_forward(network: PUNet, image: Tensor, classes: Sequence[str]) -> Tensor:
    """Image (B, C, H, W, D) and a class name for each element -> logits (B, 2, H, W, D)."""
    stem, body = network.body.stem, network.body
    x = F.leaky_relu(norm(stem.norm1, conv(stem.conv1, image)))
    x = F.leaky_relu(norm(stem.norm2, conv(stem.conv2, x)) + norm(stem.shortcut_norm, conv(stem.shortcut, image)))
    skips = []
    for name, block in body.encoder.items():
        y = conv(block.conv, F.leaky_relu(norm(block.norm, x)))
        y = attend_twice(network, name, y, classes)
        x = y + conv(block.shortcut, norm(block.shortcut_norm, x))
        skips.append(x)
    skips.pop()
    for name, block in body.decoder.items():
        skip = skips.pop()
        up = F.interpolate(x, scale_factor=[float(s) for s in block.scale], mode="trilinear", align_corners=False)
        up = up[:, :, : skip.shape[2], : skip.shape[3], : skip.shape[4]]
        y = conv(block.conv, F.leaky_relu(norm(block.norm, torch.cat([up, skip], 1))))
        x = attend_twice(network, name, y, classes)
    logits = similarity(network, x, classes)
    return F.interpolate(logits, scale_factor=[2.0, 2.0, 1.0], mode="trilinear", align_corners=False)


def conv(layer: nn.Conv3d, x: Tensor) -> Tensor:
    return F.conv3d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def norm(layer: nn.BatchNorm3d, x: Tensor) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)


def attend_twice(network: PUNet, name: str, x: Tensor, classes: Sequence[str]) -> Tensor:
    block = network.body.level(name).attention
    plans = [PublishedPlan(x.shape[2:], block.window_size, shifted, x.device) for shifted in (False, True)]
    x = F.pad(x, plans[0].pad).permute(0, 2, 3, 4, 1)
    for index, (layer, plan) in enumerate(zip((block.attn0, block.attn1), plans, strict=True)):
        tokens = torch.stack([network.prompts[c].tokens[name][index] for c in classes])  # (B, T, C)
        beta = torch.stack([network.prompts[c].token_bias()[name][index] for c in classes])  # (B, h, T)
        x = x.roll([-s for s in plan.shift], (1, 2, 3))
        x = plan.merge(sub_block(layer, plan.partition(x), tokens, beta, plan))
        x = x.roll(plan.shift, (1, 2, 3))
    (h, w, d), (i, j, k) = plans[0].size, plans[0].low
    return x[:, i : i + h, j : j + w, k : k + d].permute(0, 4, 1, 2, 3)


def sub_block(layer: PromptAttention, x: Tensor, tokens: Tensor, beta: Tensor, plan: PublishedPlan) -> Tensor:
    """Content (B, P, N, C), tokens (B, T, C) -> content."""
    count = tokens.shape[1]
    rows = torch.cat([tokens[:, None].expand(-1, x.shape[1], -1, -1), x], 2)  # (B, P, T + N, C)
    weight_q, weight_k, weight_v = layer.qkv.weight.chunk(3)
    query = F.linear(layer.norm(rows), weight_q)
    key, value = F.linear(query, weight_k), F.linear(query, weight_v)
    query, key, value = (rearrange(t, "b p n (h c) -> b p h n c", h=layer.num_heads) for t in (query, key, value))
    scores = query @ key.transpose(-1, -2) * layer.scale  # (B, P, h, T + N, T + N)
    content = scores[..., count:, count:] + layer.relative_bias(plan.window)
    if plan.mask is not None:
        content = content * plan.mask[:, None]
    to_tokens = scores[..., count:, :count] + beta[:, None, :, None]
    scores = torch.cat([scores[..., :count, :], torch.cat([to_tokens, content], -1)], -2)
    out = rearrange(torch.softmax(scores, -1) @ value, "b p h n c -> b p n (h c)")
    x = x + layer.out(out)[:, :, count:]
    return x + layer.mlp(layer.mlp_norm(x))


def similarity(network: PUNet, embedding: Tensor, classes: Sequence[str]) -> Tensor:
    sets = [network.prompts[c] for c in classes]
    tokens = torch.stack([torch.stack([network.prompts.background, s.head_tokens]) for s in sets])  # (B, 2, T, C)
    cosine = torch.einsum("bchwd,bitc->bithwd", F.normalize(embedding, dim=1), F.normalize(tokens, dim=-1)) + 0.5
    return ((cosine / network.head.sigma).softmax(2) * cosine).sum(2)
