"""Baselines that train some of the network's own tensors: everything, the head, biases, norms, or the last blocks.

Training biases alone is BitFit (E. Ben Zaken et al., arXiv:2106.10199, 2021).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.nets import (
    UNETR,
    DenseNet,
    DynUNet,
    FlexibleUNet,
    ResNet,
    SegResNet,
    SwinUNETR,
    UNet,
    ViT,
)
from torch import Tensor, nn

from monai_petl.adapt import Method
from monai_petl.deltas import Delta, add_delta
from monai_petl.methods.targets import (
    CONVOLUTIONS,
    NORMS,
    TRANSPOSED,
    backbone_modules,
    transformer_blocks,
    unused_parameters,
    used_modules,
)

__all__ = ["BiasOnly", "FullFineTuning", "HeadOnly", "LastBlocks", "NormOnly"]

HEADS: dict[type[nn.Module], str] = {  # of MONAI's networks; ours say it themselves, as HEAD
    ViT: "classification_head",
    UNETR: "out",
    SwinUNETR: "out",
    SegResNet: "conv_final",
    DynUNet: "output_block",
    UNet: "model.2",
    FlexibleUNet: "segmentation_head",
    ResNet: "fc",
    DenseNet: "class_layers",
}


@dataclass(frozen=True)
class FullFineTuning(Method):
    """Everything trains that the network's output depends on."""

    def attach(self, network: nn.Module, name: str) -> None:
        _train(network, (n for n, _ in network.named_parameters() if "deltas" not in n.split(".")))


@dataclass(frozen=True)
class BiasOnly(Method):
    """All biases train, those of norms too. Merged from the start: it adds nothing to the network."""

    def attach(self, network: nn.Module, name: str) -> None:
        names = [
            f"{n}.bias" for n, m in backbone_modules(network) if isinstance(getattr(m, "bias", None), nn.Parameter)
        ]
        _train(network, names, "biases")


@dataclass(frozen=True)
class NormOnly(Method):
    """Scale and shift of all normalisation layers train. Those of batch norms that train update their statistics too."""

    def attach(self, network: nn.Module, name: str) -> None:
        norms = [(n, m) for n, m in backbone_modules(network) if isinstance(m, NORMS)]
        _train(
            network, [f"{n}.{p}" for n, m in norms for p, _ in m.named_parameters(recurse=False)], "norms that train"
        )


@dataclass(frozen=True)
class LastBlocks(Method):
    """The last transformer blocks train, of a ViT, UNETR or SwinUNETR.

    Args:
        blocks: how many, counted over all stages.
    """

    blocks: int = 1

    def attach(self, network: nn.Module, name: str) -> None:
        found = transformer_blocks(network)
        if not isinstance(self.blocks, int) or not 1 <= self.blocks <= len(found):
            raise ValueError(f"blocks must be between 1 and {len(found)}, which this network has; got {self.blocks!r}")
        _train(network, [f"{n}.{p}" for n, block in found[-self.blocks :] for p, _ in block.named_parameters()])


@dataclass(frozen=True)
class HeadOnly(Method):
    """The head trains: the classifier, the output convolution, or the decoder of a ``ViTSegmenter``.

    Beside other methods it is the argument for another number of classes: ``adapt(net, [LoRA(), HeadOnly(num_classes=5)])``.

    Args:
        num_classes: put a new last layer with this many outputs in place of the head's; the old one comes back when the
            adapter is switched off. ``None`` trains the head that is there.
        head: name of the head; default ``classification_head`` of ViT, ``out`` of UNETR and SwinUNETR, ``conv_final`` of
            SegResNet, ``output_block`` of DynUNet, the last stage of UNet, and of other networks what their class says as
            ``HEAD``: ``decoder`` of ViTSegmenter, ``head`` of ViTClassifier.

    Raises:
        ValueError: there is no such head.
    """

    num_classes: int | None = None
    head: str | None = None

    def attach(self, network: nn.Module, name: str) -> None:
        known = (name for kind, name in HEADS.items() if isinstance(network, kind))
        head = self.head or getattr(network, "HEAD", None) or next(known, None)
        if head is None or not _has(network, head):
            parts = ", ".join(n for n, _ in network.named_children())
            what = f"no head called {head!r}" if head else "no head that is known here"
            raise ValueError(
                f"this {type(network).__name__} has {what}; give its name as head=, its parts are: {parts}"
            )
        if self.num_classes is None:
            _train(network, [f"{head}.{n}" for n, _ in network.get_submodule(head).named_parameters()])
            return
        if not isinstance(self.num_classes, int) or self.num_classes < 1:
            raise ValueError(f"num_classes must be a whole number of at least 1, got {self.num_classes!r}")
        if getattr(network.get_submodule(head), "beside_backbone", False):
            raise ValueError(
                f"the classes of a {type(network).__name__} are in more than one layer of its side network; build it for "
                f"{self.num_classes} classes in place of num_classes"
            )
        if getattr(network, "deep_supervision", False):
            raise ValueError(
                f"this {type(network).__name__} has further heads for deep supervision, which would keep their number of "
                "classes; build it with deep_supervision=False"
            )
        if isinstance(network, UNet) and head == "model.2":
            last: nn.Module = network.model[2]
            first, second = network.channels[:2]
            below = first if len(network.channels) > 2 else second
            width = first + below  # the stage joins its skip and what is below
            new = network._get_up_layer(width, self.num_classes, network.strides[0], True)
        else:
            _train(network, [f"{head}.{n}" for n, _ in network.get_submodule(head).named_parameters()])
            last = _last_layer(network.get_submodule(head), head)
            new = _like(last, self.num_classes)
        last.requires_grad_(False)  # also what other methods added to it
        add_delta(last, NewHead(new), name)


class NewHead(Delta):
    """The output of another layer in place of that of the head's last one."""

    tag = "head"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def replacement(self) -> nn.Module:
        return self.layer

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x)


def _train(network: nn.Module, names: Iterable[str], what: str = "parameters") -> None:
    unused, chosen = unused_parameters(network), set(names)
    found = [p for n, p in network.named_parameters() if n in chosen and n not in unused]
    if not found:
        raise TypeError(f"this {type(network).__name__} has no {what}")
    for parameter in found:
        parameter.requires_grad_(True)


def _has(network: nn.Module, name: str) -> bool:
    try:
        return any(True for _ in network.get_submodule(name).parameters())
    except AttributeError:
        return False


def _last_layer(head: nn.Module, name: str) -> nn.Module:
    layers = [m for _, m in used_modules(head) if isinstance(m, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))]
    if not layers:
        raise ValueError(f"the head {name!r} has no linear layer and no convolution that could be replaced")
    return layers[-1]


def _like(layer: Any, outputs: int) -> nn.Module:
    """A fresh layer of the same kind with another number of outputs."""
    bias = layer.bias is not None
    with torch.device(layer.weight.device):
        if isinstance(layer, nn.Linear):
            return nn.Linear(layer.in_features, outputs, bias)
        kinds = CONVOLUTIONS if isinstance(layer, CONVOLUTIONS) else TRANSPOSED
        kind = kinds[len(layer.kernel_size) - 1]
        options = {"output_padding": layer.output_padding} if layer.transposed else {}
        return kind(
            layer.in_channels,
            outputs,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            groups=layer.groups,
            dilation=layer.dilation,
            bias=bias,
            padding_mode=layer.padding_mode,
            **options,
        )
