"""Bottleneck adapters behind the attention sub-blocks of PUNet, one of the methods that prompt tuning is compared with.

The adapter goes back to N. Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751 (2019); place
and size follow arXiv:2211.09233.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from monai_petl.core.method import Method
from monai_petl.methods.prompt_tuning import punet_of
from monai_petl.networks.punet.attention import PromptAttention
from monai_petl.networks.punet.body import BottleneckAdapter

__all__ = ["BottleneckAdapters"]


@dataclass(frozen=True)
class BottleneckAdapters(Method):
    """C -> C/reduction -> C with LeakyReLU, added after each of the 18 attention sub-blocks (324,896 values).

    Args:
        reduction: C divided by the bottleneck's width.
        identity: start with a zero output (default; outputs equal the backbone's bit for bit), or as published, random.
    """

    reduction: int = 4
    identity: bool = True

    def attach(self, network: nn.Module, name: str) -> None:
        if self.reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {self.reduction}")
        if any(attention.adapter is not None for attention in _attentions(network)):
            raise ValueError("the network has bottleneck adapters already; remove them first with remove_adapter")
        narrowest = min(attention.qkv.weight.shape[1] for attention in _attentions(network))
        if self.reduction > narrowest:
            raise ValueError(f"reduction={self.reduction} leaves nothing of {narrowest} channels; choose a smaller one")
        for attention in _attentions(network):
            weight = attention.qkv.weight
            attention.adapter = BottleneckAdapter(weight.shape[1], self.reduction, self.identity).to(weight)

    def detach(self, network: nn.Module, name: str) -> None:
        for attention in _attentions(network):
            attention.adapter = None

    def set_enabled(self, network: nn.Module, name: str, enabled: bool) -> None:
        for attention in _attentions(network):
            attention.adapter_enabled = enabled


def _attentions(network: nn.Module) -> Iterator[PromptAttention]:
    body = punet_of(network, "BottleneckAdapters").body
    return (module for module in body.modules() if isinstance(module, PromptAttention))
