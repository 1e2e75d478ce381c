"""SAN: a trained side network beside a frozen transformer, which proposes masks and steers the transformer's own attention.

"Side Adapter Network for Open-Vocabulary Semantic Segmentation" (M. Xu, Z. Zhang, F. Wei, H. Hu, X. Bai, arXiv:2302.12242, CVPR
2023), for a closed list of classes, in 2D and 3D: learned class vectors stand for text embeddings, the background is a class as
it is for MONAI, both branches see the same image with side patches of half the size, and masks can be made at a finer grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import ViT
from torch import Tensor, nn
from torch.nn import functional as F

from monai_petl.networks.san.recognition import Recognition, read_regions
from monai_petl.networks.san.side import SideNetwork
from monai_petl.networks.vit.parts import ViTNetwork, first_tokens, headless, token_grid
from monai_petl.networks.vit.patches import patch_of

__all__ = ["SAN", "SAN_WIDTHS"]

SAN_WIDTHS = {"tiny": 144, "small": 192, "base": 240, "large": 288}
MODES = {"class_queries": "a query for each class", "matched": "free queries, matched to the classes of an image"}


class SAN(ViTNetwork):
    """Label scores from masks that a side network proposes and the frozen transformer recognises.

    ``adapt(network, [], also_train=["side"])`` trains the side network with all that belongs to it. The backbone stays as it
    is: of its first three quarters nothing is kept for the backward pass, and its last quarter passes gradients to the
    attention biases.

    =================  =============================================  ===============================
    mode               ``train()``                                    ``eval()``
    =================  =============================================  ===============================
    ``class_queries``  logits (B, K, *size), or two of them for      logits (B, K, *size)
                       ``DeepSupervisionLoss``, the last block first
    ``matched``        ``pred_logits`` (B, N, K + 1), ``pred_masks``  scores (B, K, *size), at least 0
                       (B, N, *grid) and ``aux_outputs``, for
                       :class:`monai_petl.losses.MatchedMaskLoss`
    =================  =============================================  ===============================

    Args:
        backbone: a MONAI ``ViT``, 2D or 3D, whose number of blocks is a multiple of four. Layers ``norm_pre`` and
            ``projection`` that it may have (CLIP) are used: on the tokens before the blocks, and behind the final norm.
        out_channels: K, classes with background.
        img_size: pixels (H, W) or voxels (H, W, D) that the backbone was built for. Other multiples of the patches are taken
            too: positions are resized.
        mode: ``class_queries`` gives each class a query for good: logits are the masks' plus the log-probability that the
            class is there. ``matched`` is the paper's.
        size: of the side network, a key of :data:`SAN_WIDTHS`.
        side_patch: of the side network; default half the backbone's where that is even, else the same.
        num_queries: N of ``matched``; default four for each class and no-object, 32 to 100.
        recognition: without it the side network's masks are the answer, and the deeper blocks do not run.
        start: of the recognition tokens, a key of :data:`monai_petl.networks.san.recognition.STARTS`; default the class
            token where there is one, else ``gap+learned``.
        pixel_upsample: stages that double the resolution of the masks; default 2 in 3D and 1 in 2D, 0 is the paper's.
        deep_supervision: the block before the last is supervised too, in training.
        side_width, side_depth, side_heads: of the side network, in place of those of ``size``.
        embed_dim, head_dim: of the embeddings, and of the hidden layers of their MLPs.
        backbone_scale: of the image that the backbone sees; the paper's CLIP sees it at half the size.
        use_checkpoint: compute the side network's activations again in the backward pass: a fifth of what is kept, a fifth
            more time.

    Raises:
        TypeError: the backbone is no ``ViT``: windowed attention (``SwinUNETR``) has no global token to steer.
        ValueError: its depth is no multiple of four, patches do not divide the image, or an option does not fit.

    Example::

        backbone = ViT(1, (96, 96, 96), (16, 16, 16), classification=True, qkv_bias=True)
        network = adapt(SAN(backbone, 3, (96, 96, 96)), [], also_train=["side"])
        logits = network(torch.rand(1, 1, 96, 96, 96))  # (1, 3, 96, 96, 96)
    """

    HEAD = "side"

    def __init__(
        self,
        backbone: ViT,
        out_channels: int,
        img_size: Sequence[int],
        *,
        mode: str = "class_queries",
        size: str = "base",
        side_patch: Sequence[int] | None = None,
        num_queries: int | None = None,
        recognition: bool = True,
        start: str | None = None,
        pixel_upsample: int | None = None,
        deep_supervision: bool = False,
        side_width: int | None = None,
        side_depth: int = 8,
        side_heads: int = 6,
        embed_dim: int = 256,
        head_dim: int = 256,
        backbone_scale: float = 1.0,
        use_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        backbone = headless(backbone, SAN)
        if len(backbone.blocks) % 4:
            raise ValueError(
                f"SAN reads states after quarters of the backbone's blocks, whose number must be a multiple of 4; this one "
                f"has {len(backbone.blocks)}"
            )
        for name, value, known in (("mode", mode, MODES), ("size", size, SAN_WIDTHS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        _check_queries(mode, out_channels, num_queries, recognition)
        if pixel_upsample is not None and pixel_upsample < 0:
            raise ValueError(f"pixel_upsample counts stages, 0 or more; got {pixel_upsample}")
        patch = patch_of(backbone.patch_embedding)
        self.img_size, self.mode, self.deep_supervision = tuple(img_size), mode, deep_supervision
        self.backbone_scale = backbone_scale
        token_grid(self.backbone_size(), patch)
        class_token = hasattr(backbone, "cls_token")
        start = start or ("cls" if class_token else "gap+learned")
        if start.startswith("cls") and not class_token:
            raise ValueError(f"start={start!r} needs a class token, and this ViT has none; use 'gap+learned'")
        matched = mode == "matched"
        count = num_queries or (min(max(4 * (out_channels + 1), 32), 100) if matched else out_channels)
        hidden_size = backbone.patch_embedding.position_embeddings.shape[2]
        for part in (*backbone.blocks[-(len(backbone.blocks) // 4) :], backbone.norm):
            part.never_used = not recognition  # so that no method trains what no gradient reaches
        reader = None
        if recognition:
            projection = getattr(backbone, "projection", None)
            out_size = hidden_size if projection is None else projection.out_features
            reader = Recognition(hidden_size, count, out_channels + matched, start, out_size)
        self.backbone = backbone
        self.side = SideNetwork(
            in_channels=backbone.patch_embedding.patch_dim // math.prod(patch),
            img_size=self.img_size,
            patch_size=side_patch or tuple(side // 2 if side % 2 == 0 else side for side in patch),
            hidden_size=hidden_size,
            num_queries=count,
            width=side_width or SAN_WIDTHS[size],
            depth=side_depth,
            num_heads=side_heads,
            bias_heads=backbone.blocks[0].attn.num_heads,
            recognition=reader,
            embed_dim=embed_dim,
            head_dim=head_dim,
            pixel_upsample=len(patch) - 1 if pixel_upsample is None else pixel_upsample,
            use_checkpoint=use_checkpoint,
        )

    def forward(self, image: Tensor) -> Any:
        levels = 2 if self.training and self.deep_supervision else 1
        spoken = self.levels(image, levels)
        size = image.shape[2:]
        if self.mode == "class_queries":
            logits = [
                _resized(masks, size) + (0 if seen is None else _log_presence(seen, size)) for masks, seen in spoken
            ]
            return logits if levels > 1 else logits[0]
        outputs = [{"pred_logits": scores, "pred_masks": masks} for masks, scores in spoken if scores is not None]
        return {**outputs[0], "aux_outputs": outputs[1:]} if self.training else semantic_scores(**outputs[0], size=size)

    def levels(self, image: Tensor, count: int = 1) -> list[tuple[Tensor, Tensor | None]]:
        """Masks and what they hold, by the last blocks of the side network.

        Args:
            image: (B, C, *size).
            count: how many blocks, 1 or 2.

        Returns:
            The last block first: mask logits (B, N, *grid), and class logits (B, N, K + 1) in mode ``matched``, logits of
            presence (B, K) in mode ``class_queries``, ``None`` without recognition.
        """
        states, tokens, grid = self.states(image)
        spoken = self.side(image, states, count)
        recognition = self.side.recognition
        if recognition is None:
            return [(level.masks, None) for level in spoken]
        read = recognition.scores if self.mode == "matched" else recognition.presence
        found = self.embeddings(recognition, tokens, [level.bias for level in spoken if level.bias is not None], grid)
        return [(level.masks, read(embedding)) for level, embedding in zip(spoken, found, strict=True)]

    def states(self, image: Tensor) -> tuple[list[Tensor], Tensor, tuple[int, ...]]:
        """What the frozen backbone knows.

        Returns:
            Residual states of the patches after 0, 1/4, 1/2 and 3/4 of the blocks, (B, C, *grid), without any norm; all
            tokens after 3/4; the grid. Nothing here depends on what trains, so autograd keeps nothing.
        """
        seen = image
        if self.backbone_scale != 1:
            mode = "bilinear" if image.ndim == 4 else "trilinear"
            seen = F.interpolate(image, self._scaled(image.shape[2:]), mode=mode)
        tokens, grid = first_tokens(self.backbone, seen, self.backbone_size())
        quarter, states = len(self.backbone.blocks) // 4, []
        for number, block in enumerate([*self.backbone.blocks[: 3 * quarter], None]):
            if number % quarter == 0:
                states.append(tokens[:, -math.prod(grid) :].mT.unflatten(2, grid))
            tokens = tokens if block is None else block(tokens)
        return states, tokens, grid

    def embeddings(
        self, recognition: Recognition, tokens: Tensor, biases: Sequence[Tensor], grid: Sequence[int]
    ) -> list[Tensor]:
        """What the deeper blocks read in the region of every mask.

        Args:
            recognition: where the tokens start.
            tokens: of the backbone, before its last quarter.
            biases: of every level, (B, heads, N, *side grid).
            grid: of the backbone's patches.

        Returns:
            (B, N, size) for each level, behind the backbone's final norm.
        """
        count, quarter = self.side.num_queries, len(self.backbone.blocks) // 4
        pool = F.adaptive_max_pool2d if len(grid) == 2 else F.adaptive_max_pool3d
        pooled = [pool(b.flatten(1, 2), tuple(grid)).flatten(2).unflatten(1, (-1, count)) for b in biases]
        start = recognition.begin(tokens, math.prod(grid), count).repeat(1, len(biases), 1)
        last = read_regions(self.backbone.blocks[-quarter:], tokens, start, torch.cat(pooled, 2))[-1]
        projected = getattr(self.backbone, "projection", nn.Identity())(self.backbone.norm(last))
        return list(projected.split(count, 1))

    def backbone_size(self) -> tuple[int, ...]:
        return self._scaled(self.img_size)

    def _scaled(self, size: Sequence[int]) -> tuple[int, ...]:
        return tuple(round(extent * self.backbone_scale) for extent in size)


def _check_queries(mode: str, out_channels: int, num_queries: int | None, recognition: bool) -> None:
    if mode == "matched" and not recognition:
        raise ValueError("mode='matched' needs recognition, which tells what a mask holds; use mode='class_queries'")
    if mode == "class_queries" and num_queries not in (None, out_channels):
        raise ValueError(f"mode='class_queries' has a query for each of {out_channels} classes, not {num_queries}")
    if num_queries is not None and num_queries < 1:
        raise ValueError(f"num_queries must be positive, got {num_queries}")


def semantic_scores(pred_logits: Tensor, pred_masks: Tensor, size: Sequence[int]) -> Tensor:
    """What every class has of all masks: (B, N, K + 1) and (B, N, *grid) -> (B, K, *size), at least 0."""
    shares = pred_logits.softmax(-1)[..., :-1]  # without no-object
    return torch.einsum("bnk,bn...->bk...", shares, _resized(pred_masks, size).sigmoid())


def _resized(masks: Tensor, size: Sequence[int]) -> Tensor:
    if masks.shape[2:] == tuple(size):
        return masks
    return F.interpolate(masks, tuple(size), mode="bilinear" if len(size) == 2 else "trilinear")


def _log_presence(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(B, K) -> (B, K, 1, ...)."""
    return F.logsigmoid(logits).view(*logits.shape, *(1 for _ in size))
