"""PUNet, a U-Net that segments whatever class its prompt tokens name.

M. Fischer, A. Bartler, B. Yang, "Prompt Tuning for Parameter-efficient Medical Image Segmentation", arXiv:2211.09233 (2022).
One frozen body of 6.8 million parameters serves every class; a class is 57,344 values (0.85 %).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from monai_petl.networks.punet.attention import WindowAttention
from monai_petl.networks.punet.body import BlockPrompts, PUNetBody
from monai_petl.networks.punet.caching import TensorCache
from monai_petl.networks.punet.heads import SimilarityHead
from monai_petl.networks.punet.layers import Conv3d, upsample
from monai_petl.networks.punet.prompts import PromptBank
from monai_petl.networks.punet.published_attention import PublishedWindowAttention
from monai_petl.networks.punet.windows import PARTITIONS

__all__ = ["PUNET_CONFIGURATIONS", "PUNet", "PUNetOutput"]

PUNET_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "2d": {"window_size": (8, 8, 1), "design_depth": 1},
    "3d_flat": {"window_size": (6, 6, 2), "design_depth": 4},
    "3d_anisotropic": {"window_size": (4, 4, 4), "design_depth": 8},
    "3d_large": {"window_size": (6, 6, 4), "design_depth": 8},
}
"""Constructor arguments of the paper's configurations: axial slices, and three for slabs of 4 or 8 slices."""


class PUNetOutput(NamedTuple):
    """Two-channel logits (B, 2, H, W, D), background first, and the dense embedding (B, C0, H/2, W/2, D)."""

    logits: Tensor
    embedding: Tensor


class _Prepared(NamedTuple):
    blocks: BlockPrompts
    head_tokens: Tensor


class PUNet(nn.Module):
    """Prompt-able U-Net.

    Images are (B, in_channels, H, W, D) with the slice axis last; a slice is a volume with D = 1, and (B, C, H, W) is
    taken as such. ``network(image)`` segments all active classes and returns (B, 1 + classes, H, W, D): channel 0 is
    zero and channel k is the margin (class minus background logit) of class k, so that ``argmax`` gives the class with the
    largest margin where any is positive, else background. ``network(image, classes)`` with one name for each batch
    element is the pass that training uses and returns a :class:`PUNetOutput`.

    Args:
        in_channels: image channels.
        classes: names of the classes to make prompts for; more are added with ``network.prompts.add_class``.
        channels: width of each level.
        num_heads: attention heads of every level.
        window_size: attention window (h, w, d) in voxels.
        design_depth: number of slices for which depth kernels and strides are made; the input may have another depth.
        tokens_per_class: prompt tokens T of a class and sub-block.
        prompt_depth: levels that get tokens, see :class:`monai_petl.networks.punet.prompts.PromptSet`.
        prompting: ``"separate"`` passes for each class (batched) or ``"joint"``, one pass that attends to the tokens of all
            classes. Eight joint classes cost less than two passes, but the classes influence each other.
        partition: ``"grid"`` or ``"block"`` windows, see :class:`monai_petl.networks.punet.windows.WindowPlan`.
        arithmetic: ``"corrected"``, or ``"published"`` for numerical parity with the paper's code (slower; grid windows).
        similarity: aggregation of the head, see :class:`monai_petl.networks.punet.heads.SimilarityHead`.
        sigma: temperature of the head's soft selection; default 0.05 (0.1 in published arithmetic: the same selection).
        logit_scale: scale of the head's logits (always 1 in published arithmetic).
        mlp_ratio: width of the attention block's perceptron; 1 is the paper's single linear layer.
        bias_width: width of the tables behind relative-position and token bias.
        dropout: dropout on prompt tokens in training, for uncertainty by prompt perturbation.

    Raises:
        ValueError: an argument is none of the choices above.

    Example::

        network = PUNet(classes=("liver", "spleen"))
        logits = network(torch.randn(1, 1, 224, 224, 1))  # (1, 3, 224, 224, 1)
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: Sequence[str] = (),
        *,
        channels: Sequence[int] = (32, 64, 128, 256, 384),
        num_heads: int = 8,
        window_size: Sequence[int] = (8, 8, 1),
        design_depth: int = 1,
        tokens_per_class: int = 16,
        prompt_depth: str = "full",
        prompting: str = "separate",
        partition: str = "grid",
        arithmetic: str = "corrected",
        similarity: str = "soft",
        sigma: float | None = None,
        logit_scale: float = 10.0,
        mlp_ratio: float = 1.0,
        bias_width: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for given, allowed, what in (
            (prompting, ("separate", "joint"), "prompting"),
            (partition, PARTITIONS, "partition"),
            (arithmetic, ("corrected", "published"), "arithmetic"),
        ):
            if given not in allowed:
                raise ValueError(f"{what} must be one of {allowed}, got {given!r}")
        published = arithmetic == "published"
        if published and partition != "grid":
            raise ValueError("arithmetic='published' has grid windows only; use partition='grid'")
        if len(window_size) != 3 or min(window_size) < 1:
            raise ValueError(
                f"window_size must be three positive numbers of voxels (h, w, d), got {tuple(window_size)}"
            )
        default_sigma = 0.1 if published else 0.05
        make = PublishedWindowAttention if published else WindowAttention

        def attention(width: int) -> WindowAttention:
            return make(width, num_heads, window_size, partition=partition, bias_width=bias_width, mlp_ratio=mlp_ratio)

        self.prompt_depth = prompt_depth
        self.prompting = prompting
        self.body = PUNetBody(in_channels, channels, design_depth, attention)
        if published:  # the sign of an activation near zero, and with it a gradient, can hang on the last bit
            for module in self.body.modules():
                if isinstance(module, Conv3d):
                    module.slices_as_images = False
        self.prompts = PromptBank(
            self.body.blocks,
            tokens=tokens_per_class,
            num_heads=num_heads,
            bias_width=bias_width,
            embedding_channels=channels[0],
            dropout=dropout,
        )
        self.head = SimilarityHead(
            similarity, sigma=default_sigma if sigma is None else sigma, logit_scale=logit_scale, published=published
        )
        self.heads = nn.ModuleDict()  # classes that have a convolution in place of prompts
        self._dropout = dropout
        self._active: list[str] | None = None  # None: all
        self._hidden: set[str] = set()
        self._cache: TensorCache[_Prepared] = TensorCache()
        for name in classes:
            self.prompts.add_class(name, depth=prompt_depth)

    @property
    def classes(self) -> list[str]:
        """All classes that this network can segment, in the order in which they were added."""
        return [*self.prompts.names, *(name for name in self.heads if name not in self.prompts.names)]

    @property
    def active_classes(self) -> list[str]:
        """The classes that ``network(image)`` segments, in the order of its output channels 1, 2, ..."""
        shown = [name for name in self.classes if name not in self._hidden]
        if self._active is None:
            return shown
        chosen = [name for name in self._active if name in shown]
        return (
            shown if self._active and not chosen else chosen
        )  # every chosen one is hidden or removed: all that are left

    @active_classes.setter
    def active_classes(self, names: Sequence[str] | None) -> None:
        """Choose classes and their order; ``None`` for all."""
        for name in names or ():
            self._require(name)
        self._active = None if names is None else list(names)
        self._hidden.clear()

    def show(self, name: str, shown: bool) -> None:
        """Hide one class in ``network(image)``, or show it again in its place; a class that was not active comes last."""
        if not shown:
            self._hidden.add(name)
        elif name in self._hidden:
            self._hidden.remove(name)
        elif name not in self.active_classes:
            self.active_classes = [*self.active_classes, name]

    def forward(self, image: Tensor, classes: Sequence[str] | None = None) -> Tensor | PUNetOutput:
        """Segment all active classes, or (with ``classes``) one given class for each batch element.

        Raises:
            KeyError: a class is unknown.
            ValueError: the image has another number of axes, or ``classes`` another length than the batch.
        """
        if image.dim() == 4:
            out = self.forward(image.unsqueeze(-1), classes)
            return out.squeeze(-1) if isinstance(out, Tensor) else PUNetOutput(*(t.squeeze(-1) for t in out))
        if image.dim() != 5:
            raise ValueError(f"image must be (B, C, H, W, D) or (B, C, H, W), got shape {tuple(image.shape)}")
        return self.segment(image, self.active_classes) if classes is None else self.binary(image, classes)

    def binary(self, image: Tensor, classes: Sequence[str]) -> PUNetOutput:
        """Class ``classes[b]`` against background in image b; (B, C, H, W, D) -> logits (B, 2, H, W, D) and embedding."""
        if isinstance(classes, str) or len(classes) != len(image):
            raise ValueError(f"one class name for each of the {len(image)} batch elements is needed, got {classes!r}")
        for name in classes:
            self._require(name)
        headed = [name in self.heads for name in classes]
        if any(headed) and not all(headed):
            return self._binary_in_two(image, classes, headed)
        if any(headed):
            embedding = self.body(image)
            logits = torch.cat([self.heads[name](embedding[b : b + 1]) for b, name in enumerate(classes)])
            return PUNetOutput(self._enlarge(logits, image), embedding)
        names = tuple(dict.fromkeys(classes))
        rows = torch.tensor([names.index(name) for name in classes], device=image.device)
        prepared = self._prepare(names)
        embedding = self.body(image, _select(prepared.blocks, rows))
        return PUNetOutput(self._enlarge(self.head(embedding, prepared.head_tokens[rows]), image), embedding)

    def _binary_in_two(self, image: Tensor, classes: Sequence[str], headed: Sequence[bool]) -> PUNetOutput:
        """Elements with a convolution head first, then the prompted ones; in the order of the batch again."""
        order = sorted(range(len(classes)), key=lambda b: not headed[b])
        first, last = order[: sum(headed)], order[sum(headed) :]
        parts = [self.binary(image[rows], [classes[b] for b in rows]) for rows in (first, last)]
        back = torch.tensor(order, device=image.device).argsort()
        return PUNetOutput(*(torch.cat(pair)[back] for pair in zip(*parts, strict=True)))

    def segment(self, image: Tensor, classes: Sequence[str]) -> Tensor:
        """Margins of several classes, (B, C, H, W, D) -> (B, 1 + classes, H, W, D); channel 0 is zero (background)."""
        if not classes:
            raise ValueError(f"no class to segment; this network knows: {', '.join(self.classes) or 'none'}")
        for name in classes:
            self._require(name)
        prompted = tuple(name for name in classes if name not in self.heads)
        margins: dict[str, Tensor] = {}
        if prompted and self.prompting == "joint":
            margins.update(zip(prompted, self._joint_margins(image, prompted).unbind(1), strict=True))
        elif prompted:
            margins.update(zip(prompted, self._separate_margins(image, prompted).unbind(1), strict=True))
        if len(prompted) < len(classes):
            embedding = self.body(image)
            for name in classes:
                if name in self.heads:
                    logits = self._enlarge(self.heads[name](embedding), image)
                    margins[name] = logits[:, 1] - logits[:, 0]
        background = torch.zeros_like(next(iter(margins.values())))
        return torch.stack([background, *(margins[name] for name in classes)], 1)

    def _separate_margins(self, image: Tensor, names: tuple[str, ...]) -> Tensor:
        prepared, count = self._prepare(names), len(names)
        rows = torch.arange(count, device=image.device).repeat(image.shape[0])
        embedding = self.body(image, _select(prepared.blocks, rows), passes=count)
        logits = self.head(embedding, prepared.head_tokens[rows])  # (B * classes, 2, h, w, D)
        margins = (logits[:, 1] - logits[:, 0]).unflatten(0, (image.shape[0], count))
        return self._enlarge(margins, image)

    def _joint_margins(self, image: Tensor, names: tuple[str, ...]) -> Tensor:
        prepared = self._prepare(names, joint=True)
        rows = torch.zeros(image.shape[0], dtype=torch.long, device=image.device)
        embedding = self.body(image, _select(prepared.blocks, rows))
        logits = self.head(embedding, prepared.head_tokens[rows])  # (B, 1 + classes, h, w, D)
        backgrounds = logits.shape[1] - len(names)  # 1, or one a class
        return self._enlarge(logits[:, backgrounds:] - logits[:, :backgrounds], image)

    def _prepare(self, names: tuple[str, ...], joint: bool = False) -> _Prepared:
        """Token keys and values of these classes. They do not depend on the image: kept in inference."""

        def compute() -> _Prepared:
            stacked = self.prompts.stack(names)
            if joint:
                stacked = stacked.joined()
            return _Prepared(self.body.project(stacked), stacked.head_tokens)

        if self._dropout and any(self.prompts[name].dropout.training for name in names):
            return compute()
        return self._cache.get((names, joint), self._prompt_sources(names), compute)

    def _prompt_sources(self, names: Sequence[str]) -> list[Tensor]:
        sources: list[Tensor] = [self.prompts.background]
        for name in names:
            sources += self.prompts[name].parameters()
        for block in self.body.blocks:
            window = self.body.level(block).attention
            for attention in (window.attn0, window.attn1):
                sources += [attention.qkv.weight, attention.norm.weight, attention.norm.bias]
        return sources

    def _enlarge(self, logits: Tensor, image: Tensor) -> Tensor:
        """To the size of the image; an odd extent is cropped at the end."""
        return upsample(logits, (2, 2, 1))[..., : image.shape[2], : image.shape[3], :]

    def _require(self, name: str) -> None:
        if name not in self.heads:
            self.prompts.require([name])


def _select(blocks: BlockPrompts, rows: Tensor) -> BlockPrompts:
    return {name: (first.select(rows), second.select(rows)) for name, (first, second) in blocks.items()}
