"""Embedded prompt tuning: columns of trained logits beside those of attention, which turn its output down place by place.

W. Zu, S. Xie, Q. Zhao, G. Li, L. Ma, "Embedded prompt tuning: Towards enhanced calibration of pretrained models for medical
images", Medical Image Analysis 97, 103258 (2024), arXiv:2407.01003.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import ViT
from torch import Tensor, nn
from torch.nn import functional as F

from monai_petl.core.deltas import Delta, add_delta, deltas_of
from monai_petl.core.method import Method
from monai_petl.core.observe import observe
from monai_petl.core.records import find_record
from monai_petl.core.roles import vision_transformers
from monai_petl.methods.parts.foreign_attention import require_known_blocks

__all__ = ["EPT", "EPT_FORMS", "EPTDelta", "attention_gates", "collapse_prompts"]

IDENTITY_GATE = (
    22.0  # the gate starts at sigmoid(22) where all logits are equal; some of pre-trained ones are far below
)

Form = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


def literal(q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """As published: one softmax over prompts and logits, then the columns of the prompts are dropped."""
    return _drop(kept_weights(q, k, prompts, scale), dropout) @ v


def kept_weights(q: Tensor, k: Tensor, prompts: Tensor, scale: float) -> Tensor:
    """Weights of attention (B, heads, N, N); their sum over the keys is the gate, below 1."""
    logits = q @ k.mT * scale
    columns = prompts.to(logits).expand(*logits.shape[:2], -1, -1)
    return torch.cat((columns, logits), -1).softmax(-1)[..., prompts.shape[1] :]


def gate(q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """sigmoid(z - c) times the attention of the frozen network; z, c: log-sum-exp of its logits and of the prompts."""
    logits = q @ k.mT * scale
    factor = torch.sigmoid(logits.logsumexp(-1) - _offset(prompts).to(logits))
    return factor[..., None] * (_drop(logits.softmax(-1), dropout) @ v)


def sink(q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """One more key, whose value is zero, and c as the additive mask of its column: fused attention does the rest."""
    mask = F.pad(_offset(prompts).to(q)[:, None], (k.shape[2], 0))  # (N, N + 1), the last column not zero
    key, value = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (k, v))
    return F.scaled_dot_product_attention(q, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def maskless(q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """The sink without a mask, for kernels that take none: c goes in by eight more channels of queries and keys."""
    columns = (_offset(prompts) / scale).to(q)[:, None]
    extra = F.pad(columns, (0, 7)).expand(*q.shape[:2], -1, -1)
    key = F.pad(k, (0, 8, 0, 1))
    picks_c = F.pad(torch.ones_like(key[:, :, -1:, -8:-7]), (k.shape[3], 7))
    key = torch.cat((key[:, :, :-1], picks_c), 2)
    query, value = torch.cat((q, extra), -1), F.pad(v, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)


EPT_FORMS: dict[str, Form] = {"sink": sink, "maskless": maskless, "gate": gate, "literal": literal}


class EPTDelta(Delta):
    """Prompts of one attention: ``logits`` (N, P), a row for each token that asks, class token first.

    Args:
        tokens: N.
        columns: P.
        start: log-sum-exp of every row, or nothing for normal draws of deviation 0.02, as published.
        form: a key of :data:`EPT_FORMS`; all compute the same.
    """

    tag = "ept"

    def __init__(self, tokens: int, columns: int, start: float | None, form: str = "sink") -> None:
        super().__init__()
        self.form = form
        self.logits = nn.Parameter(torch.empty(tokens, columns))
        if start is None:
            nn.init.normal_(self.logits, std=0.02)
        else:
            nn.init.constant_(self.logits, start - math.log(columns))

    def around(self, block: nn.Module, run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attention: Any = block
        if (args and args[0] is not None) or kwargs.get("attn_mask") is not None:
            raise ValueError(
                "EPT has no use for an attention mask; use LoRA() or VPETL() in a network that masks tokens"
            )
        prompts = _prompts(attention)
        if len(prompts) != x.shape[1]:
            raise ValueError(
                f"EPT has prompts for {len(prompts)} tokens, and attention got {x.shape[1]}; give images of the size that the "
                "network was built for (resize(img_size) of ViTClassifier changes it), and no tokens of VPT beside them"
            )
        q, k, v = _projected(attention, x)
        dropout = attention.drop_weights.p if attention.drop_weights.training else 0.0
        if attention.save_attn:
            attention.att_mat = kept_weights(q, k, prompts, attention.scale).detach()
        out = EPT_FORMS[self.form](q, k, v, prompts, attention.scale, dropout).to(v)
        out = attention.out_rearrange(out)
        y = attention.drop_output(attention.out_proj(out) if attention.include_fc else out)
        for delta in attention.deltas.values():  # those before this one, which ``run`` would have applied
            if delta is self:
                break
            if delta.active and not isinstance(delta, EPTDelta):
                y = delta(x, y)
        return y

    @torch.no_grad()
    def resize(self, trained: Sequence[int], grid: Sequence[int]) -> None:
        """For another grid: c is linear between places, and as much more as there are more keys, so that the gate stays."""
        first = len(self.logits) - math.prod(trained)
        mode = "bilinear" if len(grid) == 2 else "trilinear"

        def between(rows: Tensor) -> Tensor:
            places = rows[first:].mT.unflatten(1, tuple(trained))[None]
            return torch.cat((rows[:first], F.interpolate(places, tuple(grid), mode=mode)[0].flatten(1).mT))

        columns, wanted = between(self.logits), between(_offset(self.logits)[:, None])
        wanted = wanted + math.log(len(wanted) / len(self.logits))
        self.logits = nn.Parameter(columns + wanted - _offset(columns)[:, None], self.logits.requires_grad)


@dataclass(frozen=True)
class EPT(Method):
    """A gate on every row of attention, learned place by place, in a ViT or UNETR. Cannot be merged.

    Row i of attention becomes sigmoid(z_i - c_i) softmax(a_i) V, with z_i the log-sum-exp of its logits a_i and c_i that of P
    prompts (Section 3.2 of the paper adds them as columns). c is all that counts: P columns compute what one does, and under
    SGD they learn as one does at a rate of 1 / P. N P values a block, N being the patches and the class token.

    Gradients vanish where the gate is near 1, so prompts need a rate of their own under Adam, about 0.1, and an epsilon far
    below torch's (1e-16).

    Args:
        num_columns: P.
        init: ``"identity"`` (the output is that of the backbone to 1e-4), ``"published"`` (normal, deviation 0.02: the
            gate starts near N / (N + P)), or a number, with which every c starts.
        blocks: numbers of the blocks that get prompts, from 0; default all.
        form: a key of :data:`EPT_FORMS`, which compute the same: ``"sink"`` is the fast one, ``"literal"`` the published one.

    Raises:
        TypeError: the network has no plain ViT, or attention with relative positions or a causal order.
        ValueError: an argument is out of range.
    """

    num_columns: int = 1
    init: str | float = "identity"
    blocks: Sequence[int] | None = None
    form: str = "sink"

    def attach(self, network: nn.Module, name: str) -> None:
        if not isinstance(self.num_columns, int) or self.num_columns < 1:
            raise ValueError(f"num_columns must be a whole number of at least 1, got {self.num_columns!r}")
        if self.init not in ("identity", "published") and not isinstance(self.init, int | float):
            raise ValueError(f"init must be 'identity', 'published' or a number, got {self.init!r}")
        if self.form not in EPT_FORMS:
            raise ValueError(f"form must be one of {', '.join(EPT_FORMS)}; got {self.form!r}")
        transformers = [(n, m) for n, m in vision_transformers(network) if isinstance(m, ViT)]
        if not transformers:
            raise TypeError(
                f"EPT needs a vision transformer whose tokens all attend to each other (MONAI's ViT or UNETR); got "
                f"{type(network).__name__}. Use LoRA() for windows and convolutions"
            )
        require_known_blocks(network, transformers)
        for where, transformer in transformers:
            vit: Any = transformer
            tokens = vit.patch_embedding.position_embeddings.shape[1] + hasattr(vit, "cls_token")
            for place in self._chosen(len(vit.blocks)):
                attention = vit.blocks[place].attn
                if attention.rel_positional_embedding is not None or attention.causal:
                    raise TypeError(
                        f"EPT cannot work at block {place} of {where or type(network).__name__}: its attention has relative "
                        "positions or a causal order. Use LoRA(), VPETL() or FFNAdapter()"
                    )
                add_delta(attention, EPTDelta(tokens, self.num_columns, self._start(tokens), self.form), name)

    def _chosen(self, depth: int) -> list[int]:
        blocks = range(depth) if self.blocks is None else self.blocks
        if sorted({*blocks} & {*range(depth)}) != sorted(blocks):
            raise ValueError(f"blocks must be different numbers of blocks, 0 to {depth - 1}; got {list(blocks)}")
        return list(blocks)

    def _start(self, tokens: int) -> float | None:
        if self.init == "published":
            return None
        return math.log(tokens) - IDENTITY_GATE if self.init == "identity" else float(self.init)


@torch.no_grad()
def collapse_prompts(network: nn.Module, name: str | None = None) -> nn.Module:
    """Put one column in place of several, which computes the same, in place. Optimisers have to be made anew.

    Args:
        network: with an adapter of :class:`EPT`.
        name: the adapter; default the one attached last.

    Returns:
        The same network; its adapter's file is smaller by the number of columns.

    Raises:
        ValueError: the adapter has no such prompts.
    """
    name, record = find_record(network, name)
    deltas = [delta for _, delta in deltas_of(network, name) if isinstance(delta, EPTDelta)]
    if not deltas:
        raise ValueError(f"adapter {name!r} has no embedded prompts; collapse_prompts is for EPT")
    for delta in deltas:
        delta.logits = nn.Parameter(_offset(delta.logits)[:, None], delta.logits.requires_grad)
    record.methods = [dataclasses.replace(m, num_columns=1) if isinstance(m, EPT) else m for m in record.methods]
    return network


def attention_gates(network: nn.Module, image: Tensor) -> Tensor:
    """How far each row of attention is turned down: (L, B, heads, N) in (0, 1), over the blocks with prompts.

    Args:
        network: with active prompts; put it into evaluation mode first.
        image: what it takes, (B, C, ...).

    Raises:
        ValueError: it has none.
    """

    def gate_of(attention: Any, x: Tensor, _: Tensor) -> Tensor:
        q, k, _ = _projected(attention, x)
        return torch.sigmoid((q @ k.mT * attention.scale).logsumexp(-1) - _offset(_prompts(attention)))

    prompted = {id(layer): layer for layer, delta in deltas_of(network) if isinstance(delta, EPTDelta) and delta.active}
    if not prompted:
        raise ValueError(
            "this network has no embedded prompts that are switched on; attach them with adapt(network, EPT())"
        )
    return observe(network, image, prompted.values(), gate_of)


def _prompts(attention: Any) -> Tensor:
    """(N, P), of all adapters that are switched on."""
    deltas = attention.deltas.values()
    return torch.cat([delta.logits for delta in deltas if isinstance(delta, EPTDelta) and delta.active], 1)


def _projected(attention: SABlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, heads, N, channels of a head) each."""
    block = cast(Any, attention)
    if block.use_combined_linear:
        q, k, v = block.input_rearrange(block.qkv(x))
    else:
        q, k, v = (block.input_rearrange(layer(x)) for layer in (block.to_q, block.to_k, block.to_v))
    if block.attention_dtype is not None:
        q, k = q.to(block.attention_dtype), k.to(block.attention_dtype)
    return q, k, v


def _offset(prompts: Tensor) -> Tensor:
    """c, (N,)."""
    return prompts[:, 0] if prompts.shape[1] == 1 else prompts.logsumexp(1)


def _drop(weights: Tensor, dropout: float) -> Tensor:
    return F.dropout(weights, dropout) if dropout else weights
