"""Ways to train a ViTSegmenter from a pre-trained backbone, by name, so that a config switches among them."""

from __future__ import annotations

import logging
import os

from monai_petl.adapt import adapt
from monai_petl.inflation.tensor_rules import Mode
from monai_petl.networks import ViTSegmenter
from monai_petl.networks.segmenter_weights import load_backbone
from monai_petl.summary import summary

__all__ = ["SEGMENTER_VARIANTS", "adapt_segmenter"]

logger = logging.getLogger(__name__)

SEGMENTER_VARIANTS = {
    "frozen": "the decoder, on the frozen pre-trained backbone",
    "full": "everything, from the pre-trained backbone",
    "scratch": "everything, from random weights",
}


def adapt_segmenter(
    network: ViTSegmenter, variant: str, pretrained_path: str | os.PathLike | None = None, inflation: Mode = "center"
) -> ViTSegmenter:
    """Load the pre-trained backbone and freeze what the variant does not train.

    Args:
        network: a fresh network; changed in place.
        variant: a key of :data:`SEGMENTER_VARIANTS`.
        pretrained_path: a 2D checkpoint, see :func:`monai_petl.networks.load_backbone`; ``None`` leaves the weights.
        inflation: ``center`` or ``average``.

    Returns:
        The same network. Its adapter is called after the variant.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not fit the network; there is no variant of this name.
    """
    if variant not in SEGMENTER_VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(SEGMENTER_VARIANTS)}; got {variant!r}")
    if variant != "scratch":
        if pretrained_path is None:
            logger.warning("no pretrained_path: the variant %s starts from random weights", variant)
        else:
            load_backbone(network, pretrained_path, inflation)
    adapt(network, [], ["decoder", *([] if variant == "frozen" else _used(network))], name=variant)
    logger.info("%s:\n%s", variant, summary(network))
    return network


def _used(network: ViTSegmenter) -> list[str]:
    """Parts of the backbone that the scores depend on; MONAI's blocks have a norm for cross attention besides.

    Training in several processes refuses parameters without a gradient.
    """
    parts = ["patch_embedding", "blocks.*.norm[12]", "blocks.*.attn", "blocks.*.mlp", "norm"]
    parts += ["cls_token"] if hasattr(network.backbone, "cls_token") else []
    return [f"backbone.{part}" for part in parts]
