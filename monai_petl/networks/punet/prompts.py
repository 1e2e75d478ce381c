"""Prompt tokens of PUNet, one set a class, kept in a bank under the class's name.

M. Fischer, A. Bartler, B. Yang, "Prompt Tuning for Parameter-efficient Medical Image Segmentation", arXiv:2211.09233 (2022).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["PROMPT_DEPTHS", "PromptBank", "PromptSet", "StackedPrompts", "xavier_parameter"]

PROMPT_DEPTHS = ("full", "encoder", "decoder", "start", "end")
NO_ATTENTION = -1e3  # bias of a token that a class has not got: exp(-1000) is 0 in every floating-point type


@dataclass(frozen=True)
class StackedPrompts:
    """The prompts of ``U`` classes in the form that the network reads.

    Attributes:
        tokens: block name -> (U, 2, T, C), one row of tokens for each attention sub-block.
        token_bias: block name -> (U, 2, heads, T), the content-to-token bias, the same for every query voxel.
        head_tokens: (U, 2, T, C0), background and class tokens of the similarity head.
        shared_background: whether the background tokens are the same in every row.
    """

    tokens: dict[str, Tensor]
    token_bias: dict[str, Tensor]
    head_tokens: Tensor
    shared_background: bool = True

    def joined(self) -> StackedPrompts:
        """All classes as one prompt of ``U * T`` tokens, for a joint pass over several classes.

        The head's tokens become (1, 1 + U, T, C0), or (1, U + U, T, C0) where classes have a background of their own.
        """
        tokens = {b: t.permute(1, 0, 2, 3).flatten(1, 2)[None] for b, t in self.tokens.items()}
        bias = {b: t.permute(1, 2, 0, 3).flatten(2, 3)[None] for b, t in self.token_bias.items()}
        background = self.head_tokens[: 1 if self.shared_background else None, 0]
        heads = torch.cat([background, self.head_tokens[:, 1]])[None]
        return StackedPrompts(tokens, bias, heads, self.shared_background)


class PromptSet(nn.Module):
    """The prompts of one class: deep tokens, their bias tables and head vectors, and the tokens of the head.

    Deep prompting with 16 tokens in the default network holds 57,344 values.

    Args:
        blocks: name and width of every level of the network that attends to tokens, in order.
        tokens: number of tokens T.
        num_heads: attention heads.
        bias_width: width E of the table from which the content-to-token bias is computed.
        embedding_channels: width C0 of the network's dense embedding.
        depth: which levels get tokens: ``"full"``, ``"encoder"``, ``"decoder"``, ``"start"`` (the first encoder level)
            or ``"end"`` (none; the class has tokens in the similarity head only).
        own_background: whether the class brings its own copy of the background tokens of the head.
        dropout: dropout on the deep tokens in training, for uncertainty by prompt perturbation.
    """

    is_adapter = True  # the prompts of a class are never part of the backbone
    replaced: Sequence[tuple[nn.ModuleDict, int, nn.Module]] = ()  # what a method put these prompts in the place of

    def __init__(
        self,
        blocks: Mapping[str, int],
        *,
        tokens: int = 16,
        num_heads: int = 8,
        bias_width: int = 32,
        embedding_channels: int = 32,
        depth: str = "full",
        own_background: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth not in PROMPT_DEPTHS:
            raise ValueError(f"prompt depth must be one of {PROMPT_DEPTHS}, got {depth!r}")
        if tokens < 1:
            raise ValueError(f"a class needs at least one token, got tokens={tokens}")
        self.depth = depth
        self.blocks = [name for name in blocks if _is_prompted(name, depth)]
        self.tokens = nn.ParameterDict({name: xavier_parameter(2, tokens, blocks[name]) for name in self.blocks})
        if self.blocks:
            self.bias_tables = xavier_parameter(len(self.blocks), 2, tokens, bias_width)
            self.bias_heads = xavier_parameter(len(self.blocks), 2, num_heads, bias_width)
        self.head_tokens = xavier_parameter(tokens, embedding_channels)
        self.background_tokens = xavier_parameter(tokens, embedding_channels) if own_background else None
        self.dropout = nn.Dropout(dropout)

    def deep_tokens(self, block: str) -> Tensor:
        """Tokens (2, T, C) of the two attention sub-blocks of a level."""
        return self.dropout(self.tokens[block])

    def token_bias(self) -> dict[str, Tensor]:
        """Block name -> (2, heads, T): scaled products of head vectors and table rows (heterogeneous bias scores)."""
        if not self.blocks:
            return {}
        bias = self.bias_heads @ self.bias_tables.mT * self.bias_tables.shape[-1] ** -0.5
        return dict(zip(self.blocks, bias.unbind(0), strict=True))


class PromptBank(nn.Module):
    """Prompts of any number of classes by name, and the background tokens that they share in the head.

    Args:
        blocks, tokens, num_heads, bias_width, embedding_channels, dropout: as for :class:`PromptSet`.
    """

    follows_training = True  # it reads its mode to give it to new prompts

    def __init__(
        self,
        blocks: Mapping[str, int],
        *,
        tokens: int = 16,
        num_heads: int = 8,
        bias_width: int = 32,
        embedding_channels: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self._blocks = dict(blocks)
        self._make = functools.partial(
            PromptSet,
            self._blocks,
            tokens=tokens,
            num_heads=num_heads,
            bias_width=bias_width,
            embedding_channels=embedding_channels,
            dropout=dropout,
        )
        self.background = xavier_parameter(tokens, embedding_channels)
        self.classes = nn.ModuleDict()

    @property
    def names(self) -> list[str]:
        """The classes in the order in which they were added."""
        return list(self.classes)

    def __getitem__(self, name: str) -> PromptSet:
        self.require([name])
        return cast(PromptSet, self.classes[name])

    def require(self, names: Sequence[str]) -> None:
        """Raise ``KeyError`` when a class is not in the bank."""
        for name in names:
            if name not in self.classes:
                raise KeyError(
                    f"unknown class {name!r}; this network has prompts for: {', '.join(self.names) or 'none'}"
                )

    def add_class(
        self, name: str, init: str = "random", depth: str = "full", own_background: bool = False
    ) -> PromptSet:
        """Add a class.

        Args:
            name: the class's name, no dots.
            init: ``"random"`` (Xavier-uniform), ``"mean"`` (the mean of the classes that are there) or ``"copy:<class>"``.
            depth: see :class:`PromptSet`.
            own_background: a trainable copy of the shared background tokens for this class.

        Raises:
            ValueError: the name is taken or cannot be used, or ``init`` is none of the above.
        """
        self.check_name(name)
        new = self._make(depth=depth, own_background=own_background)
        new.to(self.background.device, self.background.dtype)
        if init == "mean" and self.names:
            _set_to_mean(new, [self[n] for n in self.names])
        elif init.startswith("copy:"):
            _set_to_mean(new, [self[init.removeprefix("copy:")]])
        elif init not in ("random", "mean"):
            raise ValueError(f"init must be 'random', 'mean' or 'copy:<class>', got {init!r}")
        if new.background_tokens is not None:
            new.background_tokens.data.copy_(self.background.data)
        new.train(self.training)
        self.classes[name] = new
        return new

    def check_name(self, name: str) -> None:
        """Raise ``ValueError`` when a new class cannot have this name."""
        if name in self.classes:
            raise ValueError(f"class {name!r} is there already; remove it first, or choose another name")
        if not name or "." in name or name == "background" or hasattr(self.classes, name):
            raise ValueError(
                f"{name!r} cannot be used as a class name; choose letters, digits, '_' or '-', not 'background'"
            )

    def remove_class(self, name: str) -> None:
        """Forget a class; the others stay as they are."""
        self.require([name])
        del self.classes[name]

    def freeze(self, name: str) -> None:
        """Exclude a class from training."""
        self[name].requires_grad_(False)

    def trainable(self, names: Sequence[str]) -> None:
        """Train exactly these classes; all others and the shared background are frozen."""
        self.require(names)
        self.requires_grad_(False)
        for name in names:
            self[name].requires_grad_(True)

    def stack(self, names: Sequence[str]) -> StackedPrompts:
        """The prompts of several classes, one row a class. A level where a class has no tokens gets tokens that
        attention cannot see, so that classes of different prompting depth run in one batch."""
        self.require(names)
        sets = [self[name] for name in names]
        biases = [prompts.token_bias() for prompts in sets]
        tokens: dict[str, Tensor] = {}
        token_bias: dict[str, Tensor] = {}
        for block in self._blocks:
            shown = next((i for i, prompts in enumerate(sets) if block in prompts.tokens), None)
            if shown is None:
                continue
            like, like_bias = sets[shown].tokens[block], biases[shown][block]
            tokens[block] = torch.stack(
                [p.deep_tokens(block) if block in p.tokens else torch.zeros_like(like) for p in sets]
            )
            token_bias[block] = torch.stack([b.get(block, torch.full_like(like_bias, NO_ATTENTION)) for b in biases])
        background = [self.background if p.background_tokens is None else p.background_tokens for p in sets]
        head_tokens = torch.stack(
            [torch.stack(pair) for pair in zip(background, (p.head_tokens for p in sets), strict=True)]
        )
        shared = all(p.background_tokens is None for p in sets)
        return StackedPrompts(tokens, token_bias, head_tokens, shared)


def _is_prompted(block: str, depth: str) -> bool:
    return {
        "full": True,
        "encoder": block.startswith("enc"),
        "decoder": block.startswith("dec"),
        "start": block == "enc0",
        "end": False,
    }[depth]


def xavier_parameter(*shape: int) -> nn.Parameter:
    """Xavier-uniform over the last two axes, whatever is stacked in front of them."""
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


@torch.no_grad()
def _set_to_mean(new: PromptSet, known: Sequence[PromptSet]) -> None:
    """Set every tensor of ``new`` to the mean over the sets that have a tensor of that name and meaning."""
    for block, tokens in new.tokens.items():
        same = [prompts for prompts in known if block in prompts.tokens]
        if not same:
            continue
        tokens.copy_(torch.stack([p.tokens[block] for p in same]).mean(0))
        row = new.blocks.index(block)
        for kind in ("bias_tables", "bias_heads"):
            getattr(new, kind)[row] = torch.stack([getattr(p, kind)[p.blocks.index(block)] for p in same]).mean(0)
    new.head_tokens.copy_(torch.stack([p.head_tokens for p in known]).mean(0))
