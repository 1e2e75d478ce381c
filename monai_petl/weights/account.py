"""What became of every tensor of a checkpoint, and of every tensor of the network that was built for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Account", "Entry", "Fate"]

Fate = Literal["loaded", "left out", "starts anew"]


@dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
        name: in the file, or in the network when it starts anew.
        fate: what became of it.
        why: the reason, or the name in the network of one that was loaded under another name.
    """

    name: str
    fate: Fate
    why: str = ""


@dataclass
class Account:
    """What a checkpoint is, the network that it fits, and every tensor.

    Attributes:
        path: the file or folder.
        family: whose it is, such as ``"SwinUNETR"``.
        network: class of the network.
        arguments: with which it is built.
        entries: a tensor each: all of the file, and those of the network that the file does not have.
        note: what a user should know of the file.
    """

    path: str
    family: str
    network: str
    arguments: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    note: str = ""

    def of(self, fate: Fate) -> list[Entry]:
        """The tensors of this fate."""
        return [entry for entry in self.entries if entry.fate == fate]

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        lines = [f"{self.path}: {self.family}", f"  network      {self.network}({options})"]
        for fate in ("loaded", "left out", "starts anew"):
            reasons = Counter(entry.why if fate != "loaded" else "" for entry in self.of(fate))
            for why, count in reasons.items():
                names = [entry.name for entry in self.of(fate) if fate == "loaded" or entry.why == why]
                lines.append(f"  {fate:<12} {count} tensors{f', {why}' if why else ''}: {shortened(names)}")
        return "\n".join([*lines, *([f"  note         {self.note}"] if self.note else [])])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": self.path,
            "family": self.family,
            "network": self.network,
            "arguments": self.arguments,
            "note": self.note,
            "tensors": [{"name": entry.name, "fate": entry.fate, "why": entry.why} for entry in self.entries],
        }


def shortened(names: Iterable[str], most: int = 4) -> str:
    """The modules that names begin with, the first of them."""
    modules = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
    more = f" and {len(modules) - most} modules more" if len(modules) > most else ""
    return ", ".join(modules[:most]) + more
