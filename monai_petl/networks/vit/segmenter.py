"""A segmentation network around any MONAI ``ViT``: feature maps of several blocks and a light convolutional decoder.

The decoder is in the manner of UNETR (A. Hatamizadeh et al., "UNETR: Transformers for 3D Medical Image Segmentation",
arXiv:2103.10504), for patches of any size, also another one along each axis. The class token stays in the backbone, where
``UNETR`` drops it. With ``center_slice`` it is the 2.5D network of "Adapting Pre-trained Vision Transformers from 2D to
3D through Weight Inflation Improves Medical Image Segmentation", arXiv:2302.04303 (2022), with another decoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from monai.networks.blocks import UnetOutBlock, UnetResBlock
from monai.networks.layers import Conv
from monai.networks.nets import ViT
from torch import Tensor, nn
from torch.nn import functional as F

from monai_petl.networks.vit.parts import ViTNetwork, headless
from monai_petl.networks.vit.patches import patch_of
from monai_petl.networks.vit.slices import as_slices, as_volume, slices_of

__all__ = ["DECODERS", "LinearDecoder", "TapDecoder", "ViTSegmenter"]

DECODERS = {
    "native": "convolutions of the backbone's dimensions: slice by slice with a 2D one",
    "volume": "3D convolutions over the slices of a 2D backbone, which enlarge in the plane only",
    "linear": "one 1 x 1 convolution on the grid of patches, resized to the image",
}


class ViTSegmenter(ViTNetwork):
    """Label scores of an image from the hidden states ("taps") of a vision transformer.

    =====================  ==============  ===================================================
    backbone               image           output
    =====================  ==============  ===================================================
    2D                     (B, C, H, W)    (B, K, H, W)
    2D                     (B, C, H, W, D) (B, K, H, W, D), slice by slice, any D
    3D                     (B, C, H, W, D) (B, K, H, W, D)
    3D and center_slice    (B, C, H, W, S) (B, K, H, W, 1), of slice S // 2
    =====================  ==============  ===================================================

    Slices of a volume do not see each other in a 2D backbone, unless :class:`monai_petl.methods.AIM` is attached to it.

    All but the decoder belongs to the backbone: ``adapt(network, [], also_train=["decoder"])`` trains the decoder alone,
    and then no activation of the backbone is kept for the backward pass but the taps.

    Args:
        backbone: a MONAI ``ViT`` with or without a class token (or other tokens in front of those of the patches). Its
            classification head, where it has one, is taken away.
        out_channels: K, classes with background.
        img_size: voxels (H, W) of a slice or (H, W, D) that the backbone was built for; multiples of its patch.
        taps: blocks whose outputs are read, counted from 0 and in order; default four, spread evenly. That of the last
            block passes the backbone's ``norm``, as in UNETR, the others a layer norm without weights: hidden states may
            grow fifty-fold from the first tap to the last (DINOv2), and the decoder would not hear the first ones. A linear
            decoder reads the last block only by default.
        feature_size: channels at full resolution; twice as many for each halving, at most eight times.
        center_slice: predict the centre slice of a window of S slices, whose patches are S deep; see
            :class:`monai_petl.inferers.CenterSliceInferer` for whole volumes.
        decoder: a key of :data:`DECODERS`.

    Raises:
        TypeError: the backbone is no ``ViT``.
        ValueError: a tap is not there, the sizes do not fit to the backbone, or the decoder does not.

    Example::

        backbone = ViT(1, (96, 96, 32), (16, 16, 4), qkv_bias=True, classification=True)
        logits = ViTSegmenter(backbone, 3, (96, 96, 32))(torch.rand(1, 1, 96, 96, 32))  # (1, 3, 96, 96, 32)
    """

    HEAD = "decoder"

    def __init__(
        self,
        backbone: ViT,
        out_channels: int,
        img_size: Sequence[int],
        *,
        taps: Sequence[int] | None = None,
        feature_size: int = 16,
        center_slice: bool = False,
        decoder: str = "native",
    ) -> None:
        super().__init__()
        backbone = headless(backbone, ViTSegmenter)
        patch = patch_of(backbone.patch_embedding)
        in_channels = backbone.patch_embedding.patch_dim // math.prod(patch)
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}; got {decoder!r}")
        if decoder == "volume" and len(patch) != 2:
            raise ValueError(
                f"decoder='volume' is for slices of a 2D backbone; this one has patches of {patch}. Use 'native'"
            )
        self.img_size, self.center_slice, self.by_volume = tuple(img_size), center_slice, decoder == "volume"
        if taps is None and decoder == "linear":
            taps = (len(backbone.blocks) - 1,)
        self.taps = _checked_taps(taps, len(backbone.blocks))
        grid = _checked_grid(self.img_size, patch, backbone.patch_embedding.position_embeddings.shape[1])
        if center_slice:
            if len(patch) != 3 or grid[-1] != 1:
                raise ValueError(
                    "center_slice needs a 3D backbone whose patches are as deep as the window of slices; got patches of "
                    f"{patch} in {self.img_size}"
                )
            grid, patch, in_channels = grid[:-1], patch[:-1], in_channels * patch[-1]
        self.grid = grid
        self.backbone = backbone
        hidden_size = backbone.patch_embedding.position_embeddings.shape[2]
        self.decoder: nn.Module
        if decoder == "linear":
            self.decoder = LinearDecoder(hidden_size, out_channels, len(patch), len(self.taps))
        else:
            sides = (*patch, 1) if self.by_volume else patch
            self.decoder = TapDecoder(in_channels, hidden_size, out_channels, sides, len(self.taps), feature_size)

    def forward(self, image: Tensor) -> Tensor:
        by_slices = image.ndim == 5 and len(self.img_size) == 2
        x = as_slices(image) if by_slices else image
        if tuple(x.shape[2:]) != self.img_size:
            raise ValueError(
                f"this network was built for images of {self.img_size} voxels, got {tuple(image.shape[2:])}; crop or pad "
                "them, or slide a window of that size (SlidingWindowInferer)"
            )
        if self.by_volume and not by_slices:
            raise ValueError(f"decoder='volume' needs volumes (B, C, H, W, D), got {tuple(image.shape)}")
        if by_slices:
            return self._scores_of_volume(image)
        seen = rearrange(x, "b c h w s -> b (c s) h w") if self.center_slice else x
        logits = self.decoder(seen, self.features(x))
        return logits.unsqueeze(-1) if self.center_slice else logits

    def _scores_of_volume(self, volume: Tensor) -> Tensor:
        slices, count = as_slices(volume), volume.shape[-1]
        with slices_of(self.backbone).given(count):
            features = self.features(slices)
        if self.by_volume:
            return self.decoder(volume, [as_volume(feature, count) for feature in features])
        return as_volume(self.decoder(slices, features), count)

    def features(self, image: Tensor) -> list[Tensor]:
        """The taps as maps (B, hidden size, *grid), the deepest last."""
        _, hidden = self.backbone(image)
        last = len(self.backbone.blocks) - 1
        maps = []
        for tap in self.taps:
            tokens = hidden[tap][:, -math.prod(self.grid) :]  # without the class token
            norm = self.backbone.norm
            tokens = norm(tokens) if tap == last else F.layer_norm(tokens, norm.normalized_shape, eps=norm.eps)
            maps.append(tokens.mT.unflatten(2, self.grid))
        return maps


class TapDecoder(nn.Module):
    """From maps on the grid of patches to scores at the image's resolution.

    Each level doubles the resolution by transposed convolutions, and joins what comes from below with one tap, the deepest
    tap first, and at last with the image. An axis with short patches doubles in the first levels and then stays, so that
    voxels of unequal sides become equal soon. Where patches are no power of two (14, 5), the last doubling leads beyond
    the image's size, to which the map is then resized.

    Args:
        in_channels: of the image.
        hidden_size: channels of a tap.
        out_channels: classes with background.
        patch_size: voxels of a patch along each axis.
        num_taps: number of taps; those without a level of their own join the finest level below the image's.
        feature_size: channels at full resolution.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        out_channels: int,
        patch_size: Sequence[int],
        num_taps: int = 4,
        feature_size: int = 16,
    ) -> None:
        super().__init__()
        dims = len(patch_size)
        doublings = [(extent - 1).bit_length() for extent in patch_size]
        steps = max(doublings)
        strides = [tuple(2 if step < times else 1 for times in doublings) for step in range(steps)]
        widths = [hidden_size, *(feature_size * 2 ** min(steps - level, 3) for level in range(1, steps + 1))]
        self.level_of_tap = [min(place, max(steps - 1, 0)) for place in range(num_taps)]  # of the deepest tap first

        def block(inside: int, outside: int) -> nn.Module:
            return UnetResBlock(dims, inside, outside, kernel_size=3, stride=1, norm_name="instance")

        at_grid = self.level_of_tap.count(0)
        self.merge = Conv["conv", dims](at_grid * hidden_size, hidden_size, 1) if at_grid > 1 else nn.Identity()
        self.paths = nn.ModuleList(
            _doubling(hidden_size, widths[level], strides[:level]) for level in self.level_of_tap
        )
        self.ups = nn.ModuleList(_doubling(widths[i], widths[i + 1], strides[i : i + 1]) for i in range(steps))
        self.joins = nn.ModuleList(
            block(widths[level] * (1 + self.level_of_tap.count(level)), widths[level]) for level in range(1, steps)
        )
        self.stem = block(in_channels, feature_size)
        self.last = block(widths[-1] + feature_size, feature_size)
        self.out = UnetOutBlock(dims, feature_size, out_channels)

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """
        Args:
            image: (B, C, *size).
            features: num_taps maps (B, hidden size, *grid), the deepest last.

        Returns:
            scores (B, out_channels, *size).
        """
        arriving: list[list[Tensor]] = [[] for _ in range(len(self.ups) + 1)]
        for level, path, feature in zip(self.level_of_tap, self.paths, reversed(features), strict=True):
            arriving[level].append(path(feature))
        x = self.merge(torch.cat(arriving[0], 1))
        for level, up in enumerate(self.ups, 1):
            x = up(x)
            if level <= len(self.joins):
                x = self.joins[level - 1](torch.cat([x, *arriving[level]], 1))
        return self.out(self.last(torch.cat([_resized(x, image), self.stem(image)], 1)))


class LinearDecoder(nn.Module):
    """One linear map of a patch's tokens to scores, resized (linearly along each axis) to the image.

    Args:
        hidden_size: channels of a tap.
        out_channels: classes with background.
        spatial_dims: of the maps.
        num_taps: number of taps, which are read together.
    """

    def __init__(self, hidden_size: int, out_channels: int, spatial_dims: int, num_taps: int = 1) -> None:
        super().__init__()
        self.out = Conv["conv", spatial_dims](num_taps * hidden_size, out_channels, 1)

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Scores (B, out_channels, *size) of an image (B, C, *size) from maps (B, hidden size, *grid)."""
        return _resized(self.out(torch.cat(list(features), 1)), image)


def _resized(scores: Tensor, image: Tensor) -> Tensor:
    """Of the image's size."""
    if scores.shape[2:] == image.shape[2:]:
        return scores
    return F.interpolate(scores, image.shape[2:], mode="bilinear" if image.ndim == 4 else "trilinear")


def _doubling(inside: int, outside: int, strides: Sequence[tuple[int, ...]]) -> nn.Sequential:
    """Transposed convolutions of these strides, the identity where there is none."""
    widths = [inside, *[outside] * len(strides)]
    return nn.Sequential(
        *(
            Conv["convtrans", len(stride)](widths[i], widths[i + 1], kernel_size=stride, stride=stride)
            for i, stride in enumerate(strides)
        )
    )


def _checked_taps(taps: Sequence[int] | None, blocks: int) -> tuple[int, ...]:
    if taps is None:
        return tuple(sorted({math.ceil(blocks * quarter / 4) - 1 for quarter in (1, 2, 3, 4)}))
    chosen = tuple(taps)
    if not chosen or any(not 0 <= tap < blocks for tap in chosen) or list(chosen) != sorted(set(chosen)):
        raise ValueError(
            f"taps must be increasing numbers of blocks from 0 to {blocks - 1}, since the backbone has {blocks}; got {chosen}"
        )
    return chosen


def _checked_grid(img_size: tuple[int, ...], patch: tuple[int, ...], positions: int) -> tuple[int, ...]:
    """Patches along each axis."""
    if len(img_size) != len(patch):
        raise ValueError(
            f"img_size must have {len(patch)} numbers, as the backbone's patches of {patch}; got {img_size}"
        )
    if any(extent % side for extent, side in zip(img_size, patch, strict=True)):
        raise ValueError(f"img_size must be multiples of the backbone's patches of {patch} voxels, got {img_size}")
    grid = tuple(extent // side for extent, side in zip(img_size, patch, strict=True))
    if math.prod(grid) != positions:
        raise ValueError(
            f"the backbone was built for {positions} patches, but images of {img_size} have {math.prod(grid)} patches of "
            f"{patch}; give the img_size that it was built with"
        )
    return grid
