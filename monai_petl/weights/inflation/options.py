"""The choices of inflation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from monai_petl.weights.inflation import tensor_rules as rules

__all__ = ["Options"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How 2D tensors become those of the target.

    Attributes:
        mode: ``center`` or ``average``, see ``inflate_kernel``.
        channel_mode: see ``adapt_in_channels``. Default: ``keep`` when neither channels nor dimensions change, else ``share``.
        depth_axis: spatial axis of depth: 2 for (B, C, H, W, D), 0 for (B, C, D, H, W).
        position_mode: interpolation of position tables.
        table_mode: resizing of relative position tables, see ``resize_rel_bias``.
        resize_patch: whether a patch kernel of another in-plane size may be resized, which is not exact.
        img_size: spatial size of the target's images, for the grid of its position table.
        grid: (h, w) of the source's position tables. Default: that of the target, or a square.
    """

    mode: rules.Mode = "center"
    channel_mode: rules.ChannelMode | None = None
    depth_axis: int = 2
    position_mode: str = "bicubic"
    table_mode: rules.TableMode = "spline"
    resize_patch: bool = False
    img_size: tuple[int, ...] | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        choices = {"mode": ("center", "average"), "channel_mode": (None, "share", "keep"), "depth_axis": (0, 1, 2)}
        choices["table_mode"] = ("spline", "bicubic")
        choices["position_mode"] = ("bicubic", "bilinear", "nearest", "nearest-exact", "area")
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if not isinstance(self.resize_patch, bool):
            raise ValueError(f"resize_patch must be True or False, got {self.resize_patch!r}")
        for name in ("img_size", "grid"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(int(v) for v in value))

    @classmethod
    def of(cls, mode: rules.Mode, given: Mapping[str, Any]) -> Options:
        """Options by name; an unknown one is a ``ValueError``."""
        if unknown := given.keys() - {f.name for f in fields(cls)}:
            names = ", ".join(f.name for f in fields(cls))
            raise ValueError(f"there is no option {sorted(unknown)[0]}; the options of inflation are {names}")
        return cls(mode=mode, **given)

    def in_plane(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes without that of depth."""
        return tuple(size) if len(size) == 2 else tuple(s for axis, s in enumerate(size) if axis != self.depth_axis)

    def depth(self, size: Sequence[int]) -> int | None:
        """The size along depth, None in 2D."""
        return None if len(size) == 2 else size[self.depth_axis]
