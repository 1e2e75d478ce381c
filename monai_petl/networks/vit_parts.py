"""What networks around a MONAI ``ViT`` ask of it."""

from __future__ import annotations

from monai.networks.nets import ViT
from torch import nn

__all__ = ["headless"]


def headless(backbone: nn.Module, owner: type[nn.Module]) -> ViT:
    """The transformer without its classification head: nothing outside depends on it, and an adapter should not either.

    Raises:
        TypeError: this is no ``ViT``.
    """
    missing = [name for name in ("patch_embedding", "blocks", "norm") if not hasattr(backbone, name)]
    if missing:
        raise TypeError(
            f"{owner.__name__} needs a MONAI ViT as its backbone, got {type(backbone).__name__}, which has no {missing[0]}"
        )
    if hasattr(backbone, "classification_head"):
        del backbone.classification_head
    return backbone
