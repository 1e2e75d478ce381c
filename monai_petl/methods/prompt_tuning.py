"""Prompt tuning of PUNet: a new class is a set of tokens, and nothing else trains.

M. Fischer, A. Bartler, B. Yang, "Prompt Tuning for Parameter-efficient Medical Image Segmentation", arXiv:2211.09233 (2022).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from monai_petl.adapt import Method
from monai_petl.networks import PUNet

__all__ = ["PromptTuning", "punet_of"]


@dataclass(frozen=True)
class PromptTuning(Method):
    """Teach a :class:`monai_petl.networks.PUNet` one class by its prompt tokens (57,344 values in the default network).

    Every other class's logits stay bit-identical. The start is not the identity: a class that is not there has no output
    to preserve.

    Args:
        class_name: the class; fresh prompts replace those that the network may hold under this name.
        depth: levels that get tokens: ``"full"``, ``"encoder"``, ``"decoder"``, ``"start"`` or ``"end"``.
        init: ``"random"``, ``"mean"`` of the classes that are there, or ``"copy:<class>"``.
        own_background: train a copy of the head's background tokens with the class (512 values more). Use it after
            pre-training without segmentation, where the shared ones were never trained.
    """

    class_name: str
    depth: str = "full"
    init: str = "random"
    own_background: bool = False

    def attach(self, network: nn.Module) -> None:
        bank = punet_of(network, "PromptTuning").prompts
        if self.class_name in bank.names:
            bank.remove_class(self.class_name)
        bank.add_class(self.class_name, self.init, self.depth, self.own_background)

    def detach(self, network: nn.Module) -> None:
        punet_of(network, "PromptTuning").prompts.remove_class(self.class_name)

    def set_enabled(self, network: nn.Module, enabled: bool) -> None:
        punet_of(network, "PromptTuning").show(self.class_name, enabled)


def punet_of(network: nn.Module, method: str) -> PUNet:
    """The network, when it is a PUNet.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(network, PUNet):
        raise TypeError(f"{method} needs a monai_petl.networks.PUNet, got {type(network).__name__}")
    return network
