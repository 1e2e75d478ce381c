"""Masks and their classes against a label map: bipartite matching, then a loss on matched pairs.

B. Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation" (arXiv:2112.01527), as SAN uses it (M.
Xu et al., arXiv:2302.12242, section 3.4): a target is a class that occurs in the image, a query that no target takes holds no
object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MatchedMaskLoss", "match"]

Pair = tuple[Tensor, Tensor]  # queries and the targets that they take


class MatchedMaskLoss(nn.Module):
    """Cross-entropy of classes, and binary cross-entropy and Dice of masks, over queries matched to the classes of an image.

    Masks are compared at points. Where a mask has at most ``dense`` of them these are the mask's own grid; else
    ``num_points`` random ones: uniform for the matching, the same for all masks of an image, and for the loss three quarters
    of them the most uncertain of three times as many.

    Args:
        class_weight, bce_weight, dice_weight: of the terms, in the matching cost and in the loss.
        no_object_weight: of queries without a target in the cross-entropy.
        include_background: whether label 0 is a class as others are. Without it the background is what no query claims.
        num_points: random points for a large mask.
        dense: the largest grid that is compared point by point.

    Every level of ``aux_outputs`` is matched by itself and counts as much as the last one.
    """

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        bce_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        include_background: bool = True,
        num_points: int = 12_544,
        dense: int = 48**3,
    ) -> None:
        super().__init__()
        self.class_weight, self.bce_weight, self.dice_weight = class_weight, bce_weight, dice_weight
        self.no_object_weight, self.include_background = no_object_weight, include_background
        self.num_points, self.dense = num_points, dense

    def forward(self, input: Mapping[str, Any], target: Tensor) -> Tensor:
        """
        Args:
            input: ``pred_logits`` (B, N, K + 1), no-object last; ``pred_masks`` (B, N, *grid); ``aux_outputs``, a list of
                the like.
            target: classes 0 to K - 1, (B, 1, *size).

        Raises:
            TypeError: the input has no masks, as that of a network in evaluation.
            ValueError: there is a class in the target that no vector stands for.
        """
        if not isinstance(input, Mapping) or not {"pred_logits", "pred_masks"} <= input.keys():
            raise TypeError(
                f"MatchedMaskLoss needs the dictionary that SAN(mode='matched') returns in training, got {type(input).__name__}"
            )
        classes = input["pred_logits"].shape[-1] - 1
        if target.max() >= classes or target.min() < 0:
            raise ValueError(f"the target has class {int(target.max())}, the network knows 0 to {classes - 1}")
        found = [_classes_in(label[0], self.include_background) for label in target.long()]
        count = self._num_masks(found)
        levels = [input, *input.get("aux_outputs", [])]
        with torch.autocast(target.device.type, enabled=False):  # sums over a large grid overflow in half precision
            losses = [
                self.level(level["pred_logits"].float(), level["pred_masks"].float(), found, count) for level in levels
            ]
            return torch.stack(losses).sum()

    def level(self, logits: Tensor, masks: Tensor, found: Sequence[Pair], count: float) -> Tensor:
        """The loss of one level.

        Args:
            logits: (B, N, K + 1).
            masks: (B, N, *grid).
            found: for each image its classes (M,) and their masks (M, *size).
            count: number of masks that mask terms are divided by.
        """
        wanted = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
        terms = []
        for image, (classes, regions) in enumerate(found):
            queries, targets = self._matched(logits[image], masks[image], classes, regions)
            wanted[image, queries] = classes[targets]
            terms.append(self._mask_terms(masks[image, queries], regions[targets]))
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[-1] = self.no_object_weight
        recognised = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight)
        bce, dice = torch.stack(terms).sum(0) / count
        return self.class_weight * recognised + self.bce_weight * bce + self.dice_weight * dice

    @torch.no_grad()
    def _matched(self, logits: Tensor, masks: Tensor, classes: Tensor, regions: Tensor) -> Pair:
        if not len(classes):
            return classes, classes
        points = None if self._is_dense(masks) else torch.rand(self.num_points, regions.ndim - 1, device=masks.device)
        predicted, wanted = _sampled(masks, points, masks.shape[1:]), _sampled(regions, points, masks.shape[1:])
        bce = F.softplus(-predicted) @ wanted.mT + F.softplus(predicted) @ (1 - wanted).mT
        shares = predicted.sigmoid()
        dice = 1 - (2 * shares @ wanted.mT + 1) / (shares.sum(1)[:, None] + wanted.sum(1) + 1)
        cost = self.bce_weight * bce / predicted.shape[1] + self.dice_weight * dice
        return match(cost - self.class_weight * logits.softmax(-1)[:, classes])

    def _mask_terms(self, masks: Tensor, regions: Tensor) -> Tensor:
        """Sums over the pairs of binary cross-entropy and Dice loss, (2,)."""
        if not len(masks):
            return masks.sum() * masks.new_zeros(2)
        points = None if self._is_dense(masks) else self._uncertain_points(masks)
        predicted, wanted = _sampled(masks, points, masks.shape[1:]), _sampled(regions, points, masks.shape[1:])
        bce = F.binary_cross_entropy_with_logits(predicted, wanted, reduction="none").mean(1).sum()
        shares = predicted.sigmoid()
        dice = 1 - (2 * (shares * wanted).sum(1) + 1) / (shares.sum(1) + wanted.sum(1) + 1)
        return torch.stack((bce, dice.sum()))

    @torch.no_grad()
    def _uncertain_points(self, masks: Tensor) -> Tensor:
        """(M, points, dimensions): three quarters where the masks are least certain, of three times as many."""
        dims = masks.ndim - 1
        chosen = int(0.75 * self.num_points)
        points = torch.rand(len(masks), 3 * self.num_points, dims, device=masks.device)
        sure = _sampled(masks, points, masks.shape[1:]).abs()
        nearest = sure.topk(chosen, dim=1, largest=False).indices
        picked = points.gather(1, nearest[..., None].expand(-1, -1, dims))
        return torch.cat((picked, torch.rand(len(masks), self.num_points - chosen, dims, device=masks.device)), 1)

    def _is_dense(self, masks: Tensor) -> bool:
        return math.prod(masks.shape[1:]) <= self.dense

    @staticmethod
    def _num_masks(found: Sequence[Pair]) -> float:
        """Masks of the batch, the mean over processes, at least 1."""
        count = torch.tensor(float(sum(len(classes) for classes, _ in found)), device=found[0][0].device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return max(count.item(), 1.0)


def match(cost: Tensor) -> Pair:
    """The cheapest assignment of targets to queries: (N, M) -> min(N, M) indices of each."""
    queries, targets = linear_sum_assignment(cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy())
    return torch.as_tensor(queries, device=cost.device), torch.as_tensor(targets, device=cost.device)


def _classes_in(label: Tensor, include_background: bool) -> Pair:
    """Classes that occur, (M,), and their masks, (M, *size)."""
    classes = label.unique()
    classes = classes if include_background else classes[classes > 0]
    return classes, (label == classes.view(-1, *[1] * label.ndim)).float()


def _sampled(masks: Tensor, points: Tensor | None, grid: Sequence[int]) -> Tensor:
    """Masks (M, *size) at the centres of a grid, or at points (P, d) or (M, P, d) from 0 to 1 along each axis: (M, P)."""
    if points is None:
        if masks.shape[1:] == tuple(grid):
            return masks.flatten(1)
        mode = "bilinear" if masks.ndim == 3 else "trilinear"
        return F.interpolate(masks[:, None], tuple(grid), mode=mode).flatten(1)
    dims = points.shape[-1]
    where = (2 * points.flip(-1) - 1).expand(len(masks), -1, -1)  # grid_sample wants the last axis first
    where = where.view(len(masks), -1, *[1] * (dims - 1), dims)
    return F.grid_sample(masks[:, None], where, align_corners=False).flatten(1)
