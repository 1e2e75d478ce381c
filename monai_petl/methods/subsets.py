"""Baselines that train some of the network's own tensors: everything, the head, biases, norms, or the last blocks.

Training biases alone is BitFit (E. Ben Zaken et al., arXiv:2106.10199, 2021).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
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
    ViTAutoEnc,
)
from torch import Tensor, nn

from monai_petl.core.deltas import Delta, add_delta
from monai_petl.core.method import Method
from monai_petl.core.records import adapters_of, refuse_two_heads
from monai_petl.core.roles import (
    CONVOLUTIONS,
    NORMS,
    TRANSPOSED,
    backbone_modules,
    transformer_blocks,
    unused_parameters,
    used_modules,
)
from monai_petl.methods.parts.foreign_attention import require_known_blocks
from monai_petl.methods.parts.output_layers import output_layers, runs_on

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
    ViTAutoEnc: "conv3d_transpose_1",
    DenseNet: "class_layers",
}


BATCH_OR_INSTANCE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
NO_CLASSES = {
    "VISTA3D": "it is asked for a class by a prompt. Adapt it by LoRA, and ask for the class that is nearest",
    "MaskedAutoEncoderViT": "it reconstructs patches. Load its encoder into a ViT(classification=True) or a UNETR",
    "DiffusionModelUNet": "it predicts noise. Use LoRA(), or also_train for its layer 'out'",
    "SPADEDiffusionModelUNet": "it predicts noise. Use LoRA(), or also_train for its layer 'out'",
    "ControlNet": "it steers a diffusion model. Use LoRA()",
    "DecoderOnlyTransformer": "it predicts tokens. Use LoRA(), or also_train for its layer 'to_logits'",
    "VoxelMorph": "it aligns two images. Use LoRA() for its backbone",
}
OTHER_NUMBERS = {  # heads whose number of channels follows from more than the classes
    "GlobalNet": "its last layer gives an affine matrix. Train it as it is by HeadOnly()",
}

logger = logging.getLogger(__name__)


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
    """Scale and shift of all normalisation layers train. Those of batch norms that train update their statistics too.

    A class of another library counts by its name, such as ``RMSNorm`` or the ``LayerNorm2d`` of Segment Anything.
    """

    def attach(self, network: nn.Module, name: str) -> None:
        norms = [(n, m) for n, m in backbone_modules(network) if isinstance(m, NORMS) or _is_norm(m)]
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
        require_known_blocks(network, found)
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
            SegResNet, ``output_block`` of DynUNet, the last stage of UNet, what a class says as ``HEAD`` (``decoder`` of
            ViTSegmenter, ``head`` of ViTClassifier), and of all other networks the layers that the output comes from, found by
            running the network once. Which they are is logged, and stands in :func:`monai_petl.summary`.

    Raises:
        ValueError: there is no such head, or none for classes; says what to do.
    """

    num_classes: int | None = None
    head: str | None = None

    def attach(self, network: nn.Module, name: str) -> None:
        on = [other for other, record in adapters_of(network).items() if record.enabled]
        refuse_two_heads(network, on, new=name)
        known = (name for kind, name in HEADS.items() if isinstance(network, kind))
        head = self.head or getattr(network, "HEAD", None) or next(known, None)
        if type(network).__name__ == "RetinaNet":  # of monai.apps.detection, which is not imported for this
            if self.num_classes is not None:
                raise ValueError(
                    "a RetinaNet has an output for each anchor and class, and its detector counts the classes itself; build it "
                    f"with num_classes={self.num_classes}, load the other weights, and use HeadOnly() without num_classes"
                )
            head = head or "classification_head"
        if head is None:
            self._attach_found(network, name)
            return
        if self.num_classes is not None and getattr(network, "deep_supervision", False):
            raise ValueError(
                f"this {type(network).__name__} has further heads for deep supervision, which would keep their number of "
                "classes; build it with deep_supervision=False"
            )
        self._attach_at(network, name, head)

    def _attach_at(self, network: nn.Module, name: str, head: str) -> None:
        """The head of this name trains, or a new last layer of it."""
        if not _has(network, head):
            parts = ", ".join(n for n, _ in network.named_children())
            raise ValueError(
                f"this {type(network).__name__} has no head called {head!r}; give its name as head=, its parts are: {parts}"
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
            around = network.get_submodule(head.rpartition(".")[0]) if last is network.get_submodule(head) else last
            norms = _norms_after(around, last) if isinstance(around, nn.Sequential) else {}
            if norms:
                last, new = around, _with_norms(around, last, new, norms)
        last.requires_grad_(False)  # also what other methods added to it
        add_delta(last, NewHead(new), name)

    def _attach_found(self, network: nn.Module, name: str) -> None:
        """The layers that the output comes from, as the head."""
        kind = type(network).__name__
        kinds = [base.__name__ for base in type(network).__mro__]
        if none := next((base for base in kinds if base in NO_CLASSES), None):
            raise ValueError(f"{kind} has no head for classes: {NO_CLASSES[none]}")
        other = next((base for base in kinds if base in OTHER_NUMBERS), None)
        if other and self.num_classes is not None:
            reason = OTHER_NUMBERS[other].format(self.num_classes)
            raise ValueError(f"num_classes cannot be changed in this {kind}: {reason}")
        found, example = output_layers(network)
        parts = ", ".join(n for n, _ in network.named_children())
        if not found:
            raise ValueError(
                f"the head of this {kind} was not found, since it could not be run on a single image; give its name as "
                f"head=, its parts are: {parts}"
            )
        outputs = {layer: _outputs(network.get_submodule(layer)) for layer in found}
        if self.num_classes is not None and len(set(outputs.values())) > 1:
            said = ", ".join(f"{layer} ({count})" for layer, count in outputs.items())
            raise ValueError(
                f"the output of this {kind} comes from layers of different numbers of channels: {said}; say by head= "
                "which of them the classes are"
            )
        logger.info("the head of this %s is %s, where its output comes from", kind, " and ".join(found))
        for layer in found:
            self._attach_at(network, name, layer)
        if self.num_classes is not None:
            outputs_now = [leaf for mode in (False, True) for leaf in runs_on(network, example, mode) or ()]
            channels = {leaf.shape[1] for leaf in outputs_now}
            if channels != {self.num_classes}:
                raise ValueError(
                    f"the output of this {kind} comes from {' and '.join(found)}, and it does not work with "
                    "other numbers of channels there; say by head= which layer gives the classes, or build the network for them"
                )
        network.__dict__.setdefault("_head_found", {})[name] = tuple(found)


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


def _is_norm(module: nn.Module) -> bool:
    """Whether a module without parts is a normalisation by the name of its class."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


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


def _norms_after(block: nn.Module, last: nn.Module) -> dict[str, Any]:
    """Norms with weights for the channels of a layer, behind it in its block."""
    modules = list(block.named_modules())
    place = next((place for place, (_, module) in enumerate(modules) if module is last), len(modules))
    return {
        name: module
        for name, module in modules[place:]
        if isinstance(module, BATCH_OR_INSTANCE)
        and getattr(module, "weight", None) is not None
        and module.num_features == _outputs(last)
    }


def _with_norms(block: nn.Module, last: nn.Module, new: nn.Module, norms: Mapping[str, Any]) -> nn.Module:
    """A copy of a block of one convolution and its norm, with the new convolution and a norm for its channels."""
    copied = copy.deepcopy(block)
    copied.set_submodule(next(name for name, module in block.named_modules() if module is last), new)
    for name, norm in norms.items():
        options = (norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        copied.set_submodule(name, type(norm)(_outputs(new), *options).to(norm.weight))
    return copied


def _outputs(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


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
