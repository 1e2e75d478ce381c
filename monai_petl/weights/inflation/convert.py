"""2D checkpoints of timm, torchvision and Hugging Face under the names of MONAI's 2D networks.

The conversion is exact: the MONAI network computes what the source network computes, provided that its layer norms have the
reported epsilon. What MONAI has no tensor for is folded (layer scale, position of the class token), and what cannot be folded
is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from monai_petl.weights.inflation.architecture import Architecture
from monai_petl.weights.inflation.names import SOURCES, Source, detect_source, refuse_unrepresentable, without_prefixes
from monai_petl.weights.inflation.readers import Given, read_resnet, read_swin, read_vit
from monai_petl.weights.inflation.report import Report

__all__ = ["Converted", "convert_state_dict"]


@dataclass(frozen=True)
class Converted:
    """A 2D state under MONAI's names.

    Attributes:
        state: float32 tensors; kernels (out, in, h, w), the position table (1, N, C) without class entry.
        source: the family that the names belong to.
        architecture: what the 2D MONAI network has to look like.
        report: what became of every tensor of the source.
    """

    state: dict[str, Tensor]
    source: str
    architecture: Architecture
    report: Report


def convert_state_dict(
    state: Mapping[str, Tensor],
    source: str | None = None,
    *,
    num_heads: int | None = None,
    grid: Sequence[int] | None = None,
    eps: float | None = None,
) -> Converted:
    """Rename the tensors of a 2D checkpoint for MONAI's ``ViT``, ``SwinTransformer`` or ``ResNet``.

    Args:
        state: tensors as in the library's file, or as its ``state_dict()`` gives them; prefixes of task models are cut off.
        source: one of ``SOURCES``; default: by the names.
        num_heads: heads of a ViT, which its tensors do not tell. Default: hidden size over the usual width of a head.
        grid: (h, w) patches of the position table, when it is not square.
        eps: epsilon of the layer norms, when the source differs from its family's.

    Returns:
        The converted state; the given one is not changed.

    Raises:
        ValueError: unknown family or names, missing tensors, or a part that MONAI cannot compute.
    """
    if source is not None and source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    _check_facts(num_heads, grid, eps)
    plain = without_prefixes(state)
    refuse_unrepresentable(plain.values())
    family = SOURCES[source] if source else detect_source(plain.values())
    report = Report()
    tensors = _renamed(state, plain, family, report)
    if eps is not None and eps != family.eps:
        report.notes.append(
            f"layer norm epsilon {eps:g} as given; {family.name} checkpoints usually have {family.eps:g}"
        )
    given = Given(
        eps=family.eps if eps is None else eps,
        num_heads=num_heads,
        grid=None if grid is None else (int(grid[0]), int(grid[1])),
        class_entry=not family.name.startswith("timm"),  # timm has models whose table leaves the class token out
    )
    read = {"vit": read_vit, "swin": read_swin, "resnet": read_resnet}[family.kind]
    architecture: Architecture = read(tensors, report, given)  # type: ignore[operator]
    report.notes.append(f"{family.name} checkpoint, epsilon of its normalisation {given.eps:g}")
    return Converted(tensors, family.name, architecture, report)


POOLED_NORM = re.compile(r"(?:fc_norm|pooler\.layernorm)\.(weight|bias)")  # of timm and of BEiT, with average pooling


def _check_facts(num_heads: int | None, grid: Sequence[int] | None, eps: float | None) -> None:
    if num_heads is not None and (not isinstance(num_heads, int) or num_heads < 1):
        raise ValueError(f"num_heads must be a whole number of at least 1, got {num_heads!r}")
    if grid is not None and (not isinstance(grid, Sequence) or len(grid) != 2 or isinstance(grid, str)):
        raise ValueError(f"grid must be two numbers (h, w), got {grid!r}")
    if eps is not None and not (isinstance(eps, int | float) and eps > 0):
        raise ValueError(f"eps must be a positive number, got {eps!r}")


def _renamed(
    state: Mapping[str, Tensor], plain: Mapping[str, str], family: Source, report: Report
) -> dict[str, Tensor]:
    """Tensors under the names of the family's table; every key is renamed, dropped or an error."""
    tensors: dict[str, Tensor] = {}
    unknown = []
    halves = {found[1] for key in plain.values() if (found := POOLED_NORM.fullmatch(key))}
    has_norm = any(family.rename(key) == "norm.weight" for key in plain.values())
    for key, tensor in state.items():
        pooled = POOLED_NORM.fullmatch(plain[key]) if family.kind == "vit" else None
        if pooled and not has_norm and len(halves) < 2:
            report.dropped[key] = (
                f"half a norm behind the pooling, without its {'bias' if pooled[1] == 'weight' else 'weight'}"
            )
        elif pooled and has_norm:
            report.dropped[key] = "norm behind the pooling, which the tokens do not pass"
        elif name := f"norm.{pooled[1]}" if pooled else family.rename(plain[key]):
            if name in tensors:
                raise ValueError(f"the checkpoint holds {name} twice, the second time as {key}. Remove one of the two")
            tensors[name] = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
            report.renamed[key] = name
            if pooled and name == "norm.weight":
                report.notes.append(
                    f"{key} is the only norm behind the blocks: the source applies it after averaging the tokens, this "
                    "network to each token"
                )
        elif reason := family.reason_to_drop(plain[key]):
            report.dropped[key] = reason
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"the checkpoint was read as {family.name}, but {len(unknown)} of its tensors are not known there: "
            f"{', '.join(unknown[:3])}. Remove them, or name the right family"
        )
    return tensors
