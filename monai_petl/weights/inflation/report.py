"""What became of every tensor when 2D weights were converted, inflated and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

__all__ = ["InexactInflationWarning", "Report"]


class InexactInflationWarning(UserWarning):
    """The network does not start as the 2D network: says which condition fails and how to meet it."""


@dataclass
class Report:
    """One entry a tensor, ``name -> what was done``; ``str()`` is a table.

    Attributes:
        renamed: name in the source -> name in MONAI.
        dropped: tensors of the source that the network does not use, and why.
        folded: tensors that were multiplied or added into another one.
        zero_filled: tensors that the source lacks and that are exactly zero in it.
        copied: tensors of the network that are the source's, in its own shape; those that something was folded into included.
        inflated: tensors that got input channels or a depth axis.
        interpolated: position tables and kernels of another size than the source's.
        fresh: tensors of the network that keep their initial values.
        notes: sentences about the whole network.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    zero_filled: dict[str, str] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    inflated: dict[str, str] = field(default_factory=dict)
    interpolated: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __add__(self, other: Report) -> Report:
        """Both reports in one."""
        tables = {name: {**table, **getattr(other, name)} for name, table in self._tables()}
        return Report(**tables, notes=[*self.notes, *other.notes])

    def __str__(self) -> str:
        """Counts of every kind; names and reasons of what was not simply renamed or copied; notes."""
        lines = []
        for kind, table in self._tables():
            if table:
                lines.append(f"{kind.replace('_', ' '):<14}{len(table):>6}")
                lines += [] if kind in ("renamed", "copied") else _grouped(table)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _tables(self) -> Iterator[tuple[str, dict[str, str]]]:
        for f in fields(self):
            if f.name != "notes":
                yield f.name, getattr(self, f.name)


def _grouped(table: dict[str, str], shown: int = 3) -> list[str]:
    """A line a reason, with the first few names that share it."""
    groups: dict[str, list[str]] = {}
    for name, what in table.items():
        groups.setdefault(what, []).append(name)
    return [
        f"    {what}: {', '.join(names[:shown])}{f' and {len(names) - shown} more' if len(names) > shown else ''}"
        for what, names in groups.items()
    ]
