"""What a family of published checkpoints has to say for its files to load: a subclass of :class:`Family` in its own file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

__all__ = ["Family", "Published", "blocks_of"]


@dataclass(frozen=True)
class Published:
    """A checkpoint that can be had.

    Attributes:
        name: as people call it.
        trained_on: the images.
        licence: of the weights.
        where: address of the page that has the file.
    """

    name: str
    trained_on: str
    licence: str
    where: str


class Family:
    """Checkpoints of one network, in all layouts in which they are published.

    A subclass is known to :func:`monai_petl.load_backbone` as soon as its module is imported.

    Attributes:
        title: for people.
        inputs: names of the convolutions that see the image, whose channels may differ.
        head: beginnings of the names of its output layer, which starts anew for other classes.
        published: the checkpoints of this family that can be had.
        reasons: regular expression -> why a tensor of that name in the file is not the network's.
    """

    registry: ClassVar[list[type[Family]]] = []
    title: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    head: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[tuple[Published, ...]] = ()
    reasons: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Family.registry.append(cls)

    def names(self, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
        """Names in the file -> names in the network, for its own tensors; ``None`` when this is no file of the family."""
        raise NotImplementedError

    def arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The network's arguments from its tensors, by their names in the network; what they do not tell is left out."""
        raise NotImplementedError

    def build(self, **arguments: Any) -> nn.Module:
        """The network with random values.

        Raises:
            TypeError: an argument is missing that the file does not tell.
        """
        raise NotImplementedError

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the form of the network."""
        return tensor

    def anew(self, missing: Sequence[str]) -> dict[str, str]:
        """Those of the network's tensors that a file of the family may lack -> why they start anew."""
        return {}

    def note(self) -> str:
        """What a user should know of a file of this kind, such as a difference from the published class."""
        return ""

    def left_out(self, name: str) -> str:
        """Why a tensor of the file is not the network's."""
        return next((why for form, why in self.reasons.items() if re.search(form, name)), f"no tensor of {self.title}")


def blocks_of(names: Iterable[str], form: str) -> list[int]:
    """How many blocks each level has: ``form`` finds the numbers of level and block in a name."""
    found = {(int(m[1]), int(m[2])) for name in names if (m := re.match(form, name))}
    levels = sorted({level for level, _ in found})
    return [len({block for at, block in found if at == level}) for level in levels]
