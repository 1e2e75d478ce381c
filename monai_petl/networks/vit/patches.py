"""Sizes of the patches that transformers cut images into."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.blocks.patchembedding import PatchEmbed, PatchEmbeddingBlock

__all__ = ["check_patches", "patch_of"]


def patch_of(embedding: PatchEmbeddingBlock | PatchEmbed) -> tuple[int, ...]:
    """Patch size of MONAI's patch embeddings, along each spatial axis."""
    if isinstance(embedding, PatchEmbed):
        return tuple(embedding.patch_size)
    if embedding.proj_type == "conv":
        return tuple(embedding.patch_embeddings.kernel_size)
    return tuple(n for _, n in sorted(embedding.patch_embeddings[0].axes_lengths.items()))


def check_patches(img_size: Sequence[int], patch_size: Sequence[int]) -> None:
    """Raise a ``ValueError`` when the patches do not tile the image."""
    if any(s % p for s, p in zip(img_size, patch_size, strict=True)):
        nearest = tuple(max(p, round(s / p) * p) for s, p in zip(img_size, patch_size, strict=True))
        raise ValueError(
            f"img_size {tuple(img_size)} is no multiple of patch_size {tuple(patch_size)} on every axis. Resize or crop the "
            f"images, for instance to {nearest}"
        )
