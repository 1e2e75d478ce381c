"""Names of the classes of a data set, and the label values that they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_petl.data.errors import DataError, PathLike
from monai_petl.data.texts import read_json

__all__ = ["class_names", "ignored_value", "require_names"]

IGNORE = "ignore"  # of nnU-Net: voxels that nobody annotated


def class_names(dataset_dir: PathLike, default: Sequence[str] = ()) -> dict[str, int]:
    """Reads the names of the classes: ``labels`` of ``dataset.json``, else ``labels.json``. Background (0) is left out.

    Both directions are understood, ``{"1": "liver"}`` (Decathlon) and ``{"liver": 1}`` (nnU-Net).

    Args:
        dataset_dir: the data set's folder.
        default: names of the label values 1, 2, ... when there is no such folder, as where MONAI Label gives the cases: it
            numbers the classes like the network's channels.

    Returns:
        name -> label value, in order of the values; empty when the folder has no table.

    Raises:
        DataError: when the table cannot be read, or gives a name or a value twice.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        return {name: value for value, name in enumerate(require_names(default), 1)}
    return {name: value for name, value in _label_table(root) if name.lower() != IGNORE and value != 0}


def ignored_value(dataset_dir: PathLike) -> int | None:
    """The value of nnU-Net's label ``ignore`` for voxels that nobody annotated, where the data set has one.

    Raises:
        DataError: as :func:`class_names`.
    """
    root = Path(dataset_dir)
    return (
        next((value for name, value in _label_table(root) if name.lower() == IGNORE), None) if root.is_dir() else None
    )


def _label_table(root: Path) -> list[tuple[str, int]]:
    """Names and values in order of the values, with the background and ``ignore``."""
    table = read_json(root / "dataset.json").get("labels")
    if table is None:
        table = read_json(root / "labels.json")
        table = table.get("labels", table)
    if isinstance(table, Mapping) and any(isinstance(value, list) for value in table.values()):
        raise DataError(
            f"the table of labels in {root} names regions, classes of several values: {table}. Give each class one value; "
            'data make writes merged labels with --class_names "{name: [1, 2]}"'
        )
    try:
        pairs = [
            (str(v), int(k)) if str(k).strip().lstrip("-").isdigit() else (str(k), int(v)) for k, v in table.items()
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"the table of labels in {root} must map label values to names, got {table!r}") from error
    names, values = [name for name, _ in pairs], [value for _, value in pairs]
    wrong = next((pair for pair in pairs if pair[1] < 0 or (pair[0].lower() == "background" and pair[1] != 0)), None)
    if len(set(names)) != len(pairs) or len(set(values)) != len(pairs):
        raise DataError(f"the table of labels in {root} gives a name or a value twice: {table}")
    if wrong:
        raise DataError(
            f"the table of labels in {root} gives {wrong[0]!r} the value {wrong[1]}; background is 0, classes lie above"
        )
    return sorted(pairs, key=lambda pair: pair[1])


def require_names(names: Any, what: str = "class_names") -> list[str]:
    """The names of classes as a list; a text would be taken apart into letters.

    Raises:
        DataError: they are no list, empty, no texts, or one stands there twice.
    """
    if isinstance(names, str):
        raise DataError(f"{what} must be a list of names, got the text {names!r}; write it as \"['{names}']\"")
    if not isinstance(names, Iterable):
        raise DataError(f"{what} must be a list of names, got {names!r}")
    found = list(names)
    odd = [name for name in found if not isinstance(name, str) or not name.strip()]
    twice = [name for name, count in Counter(found).items() if count > 1] if not odd else []
    if odd or twice:
        reason = f"{odd[0]!r} is no name" if odd else f"{twice[0]!r} stands there twice"
        raise DataError(f"{what} must be different names, got {found}: {reason}")
    return found
