"""The ways to adapt PUNet to a class that arXiv:2211.09233 compares, by name, so that a config switches among them."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from monai_petl.core.adapt import adapt
from monai_petl.core.method import Method
from monai_petl.core.summary import summary
from monai_petl.methods.bottleneck import BottleneckAdapters
from monai_petl.methods.class_head import ClassHead
from monai_petl.methods.lora import LoRA
from monai_petl.methods.prompt_tuning import PromptTuning
from monai_petl.networks import PUNet, load_punet_backbone

__all__ = ["PUNET_METHODS", "PUNetMethod", "adapt_punet", "punet_method"]

logger = logging.getLogger(__name__)

PUNET_METHODS = {
    "prompt": "prompt tokens in all levels (the method)",
    "prompt_encoder": "prompt tokens in the encoder",
    "prompt_decoder": "prompt tokens in the decoder",
    "prompt_start": "prompt tokens in the first encoder level",
    "prompt_end": "prompt tokens in the similarity head only",
    "prompt_bias": "prompt tokens in all levels and the body's biases",
    "head": "an output convolution",
    "bias": "an output convolution and the body's biases",
    "adapter": "an output convolution and bottleneck adapters",
    "lora": "an output convolution and low-rank factors beside the body's layers",
    "decoder": "an output convolution and the decoder",
    "full": "everything, with prompts",
    "full_head": "everything, with an output convolution",
    "scratch": "everything, with prompts, from random weights",
}


# qkv is left out: tokens, and the published arithmetic, read its weight without calling it
LORA = LoRA(targets=("body.*",), exclude=("body.stem.*", "*.qkv"))


class PUNetMethod(NamedTuple):
    """Arguments of :func:`monai_petl.adapt`, and whether the pre-trained weights are loaded and stay as they are."""

    methods: tuple[Method, ...]
    also_train: tuple[str, ...] = ()
    pretrained: bool = True

    @property
    def keeps_body(self) -> bool:
        """Whether the backbone is untouched, so that all other classes are bit-identical afterwards."""
        return not self.also_train and not any(isinstance(m, BottleneckAdapters | LoRA) for m in self.methods)


def punet_method(method: str, class_name: str, init: str = "random") -> PUNetMethod:
    """The adaptation of this name for one new class.

    Args:
        method: a key of :data:`PUNET_METHODS`.
        class_name: the new class.
        init: start of the prompts, see :class:`monai_petl.methods.PromptTuning`.

    Raises:
        ValueError: there is no method of this name.
    """
    prompts = PromptTuning(class_name, init=init)
    head = ClassHead(class_name)
    if method in ("prompt_encoder", "prompt_decoder", "prompt_start", "prompt_end"):
        return PUNetMethod((PromptTuning(class_name, depth=method.removeprefix("prompt_"), init=init),))
    methods = {
        "prompt": PUNetMethod((prompts,)),
        "prompt_bias": PUNetMethod((prompts,), ("body.*.bias",)),
        "head": PUNetMethod((head,)),
        "bias": PUNetMethod((head,), ("body.*.bias",)),
        "adapter": PUNetMethod((head, BottleneckAdapters())),
        "lora": PUNetMethod((head, LORA)),
        "decoder": PUNetMethod((head,), ("body.decoder",)),
        "full": PUNetMethod((prompts,), ("body", "prompts.background")),
        "full_head": PUNetMethod((head,), ("body",)),
        "scratch": PUNetMethod((prompts,), ("body", "prompts.background"), pretrained=False),
    }
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(PUNET_METHODS)}; got {method!r}")
    return methods[method]


def adapt_punet(
    network: PUNet,
    method: str,
    class_name: str,
    pretrained_path: str | os.PathLike | None = None,
    init: str = "random",
) -> PUNet:
    """Load the pre-trained weights, freeze them and make the network ready to learn one class.

    Args:
        network: a fresh network; changed in place.
        method: a key of :data:`PUNET_METHODS`.
        class_name: the new class. It is the only active class afterwards: ``network(image)`` has two channels.
        pretrained_path: state dict of the pre-trained network; ``None`` leaves the weights as they are.
        init: start of the prompts.

    Returns:
        The same network. Its adapter is called after the class.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not fit or lacks another class of the network; there is no method of this name.
    """
    chosen = punet_method(method, class_name, init)
    if chosen.pretrained and pretrained_path is not None:
        found = load_punet_backbone(network, pretrained_path)
        missing = [name for name in network.classes if name not in (*found, class_name)]
        if missing:
            raise ValueError(
                f"{pretrained_path} holds no prompts of {', '.join(missing)}; it has: {', '.join(found) or 'none'}. "
                "Give the classes it was pre-trained on as base_classes"
            )
        if class_name in network.prompts.names and class_name not in found:
            network.prompts.remove_class(class_name)  # its place only; nobody trained it
        forgotten = [name for name in found if name not in network.classes]
        if forgotten:
            raise ValueError(
                f"{pretrained_path} also holds {', '.join(forgotten)}, which would be lost; add them to base_classes"
            )
    adapt(network, chosen.methods, chosen.also_train, name=class_name)
    network.active_classes = [class_name]
    logger.info("%s, class %s:\n%s", method, class_name, summary(network))
    return network
