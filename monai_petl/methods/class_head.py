"""An output convolution of its own for a class: the head of PUNet's methods that use no prompts (arXiv:2211.09233)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from monai_petl.core.method import Method
from monai_petl.methods.prompt_tuning import class_replaced, punet_of, put_back, show_class
from monai_petl.networks.punet.heads import ConvHead

__all__ = ["ClassHead"]


@dataclass(frozen=True)
class ClassHead(Method):
    """Segment one class by batch norm, LeakyReLU and a 1x1x1 convolution on the un-prompted embedding (130 values).

    Args:
        class_name: the class; the head replaces what the network may hold under this name, until it is removed.
    """

    class_name: str

    def attach(self, network: nn.Module, name: str) -> None:
        punet = punet_of(network, "ClassHead")
        with class_replaced(punet, self.class_name) as before:
            punet.prompts.check_name(self.class_name)
            like = punet.prompts.background
            head = ConvHead(like.shape[1], 2).to(like.device, like.dtype)
            head.replaced = before
            punet.heads[self.class_name] = head.train(punet.training)

    def detach(self, network: nn.Module, name: str) -> None:
        punet = punet_of(network, "ClassHead")
        before = cast(ConvHead, punet.heads[self.class_name]).replaced
        del punet.heads[self.class_name]
        put_back(punet, self.class_name, before)

    def set_enabled(self, network: nn.Module, name: str, enabled: bool) -> None:
        show_class(punet_of(network, "ClassHead"), self.class_name, enabled)
