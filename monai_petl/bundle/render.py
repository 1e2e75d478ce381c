"""The configs of a bundle, put together from parts that many bundles share and one page of its own.

A part and a page are JSON files of the same form: a table of sections, each named after the configs that it goes into
(``"train"``, ``"train, inference"``). Sections of a config are merged in the order of the page's ``"parts"``, the page last,
by the rules of MONAI's config files: a later value replaces an earlier one, ``train::trainer::amp`` reaches into what is there,
``+id`` adds to a list or table, and ``%pieces.json::flip`` stands for what another file has under this name.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import ID_SEP_KEY, MACRO_KEY, MERGE_KEY, merge_kv

from monai_petl.files.atomic import write_text
from monai_petl.files.json_files import read_object

__all__ = ["render", "render_all"]

PARTS, ORDER, FILES = "parts", "order.json", "files"
REMEDY = "Mend it; CONTRIBUTING.md says how bundles are put together"


def render(page: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The configs of one bundle.

    Args:
        page: ``<bundle>.json`` in the folder of sources, with ``parts/`` beside it.

    Returns:
        Config (``"train"``) -> what it holds, ids in the order of ``parts/order.json``; those that are not there come behind
        the id before them. These are the configs that a section names first: ``"train, pretrain"`` alone makes no ``pretrain``.

    Raises:
        FileNotFoundError: there is no such page or part.
        ValueError: a file is no JSON, or an id reaches into what is not there.
    """
    page = Path(page)
    folder = page.parent / PARTS
    sources = [read_object(page, REMEDY)]
    sources = [*(read_object(folder / f"{name}.json", REMEDY) for name in sources[0].pop(PARTS, [])), *sources]
    order = _order(folder / ORDER)
    return {
        name: _sorted(
            _merged([source[key] for source in sources for key in source if name in _names(key)], folder), order
        )
        for name in dict.fromkeys(_names(key)[0] for source in sources for key in source)
    }


def render_all(sources: str | os.PathLike, bundles: str | os.PathLike) -> list[Path]:
    """Write the configs of all bundles, and the files that all of them have alike.

    Args:
        sources: a folder with a page for each bundle and ``parts/``; ``parts/files`` is copied into each bundle.
        bundles: the folder of bundles.

    Returns:
        The files that were written because they differed.

    Raises:
        FileNotFoundError: there is no page.
        ValueError: see :func:`render`.
    """
    pages = sorted(Path(sources).glob("*.json"))
    if not pages:
        raise FileNotFoundError(
            f"no page of a bundle in {sources}; give the folder that holds <bundle>.json and parts/"
        )
    alike = Path(sources) / PARTS / FILES
    texts: dict[Path, str] = {}  # of all bundles, before the first is written
    for page in pages:
        root = Path(bundles) / page.stem
        for name, config in _said_of(page).items():
            texts[root / "configs" / f"{name}.json"] = json.dumps(config, indent=4, ensure_ascii=False) + "\n"
        for file in sorted(path for path in alike.rglob("*") if path.is_file()):
            texts[root / file.relative_to(alike)] = file.read_text(encoding="utf-8")
    written = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in written:
        write_text(path, texts[path], "the config")
    return written


def _said_of(page: Path) -> dict[str, dict[str, Any]]:
    try:
        return render(page)
    except ValueError as error:
        raise ValueError(f"{page.name}: {error}") from error


def _names(section: str) -> list[str]:
    return [name.strip() for name in section.split(",")]


def _merged(sections: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for section in sections:
        for id, value in section.items():
            value = _without_macros(copy.deepcopy(value), folder)
            plus, plain = (MERGE_KEY, id[1:]) if id.startswith(MERGE_KEY) else ("", id)
            root = _root(config, plain)
            if plus and root is None:
                raise ValueError(f"{id}: there is no {plain} that something could be added to")
            target = config if root in (None, plain) else ConfigParser(config={"root": config[root]})
            try:
                merge_kv(target, id if target is config else f"{plus}root{plain[len(root or '') :]}", value)
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(f"{id} reaches into what is not there: {error}") from error
            except ValueError as error:
                raise ValueError(f"{id} cannot be added to what is there: {error}") from error
    return config


def _root(config: Mapping[str, Any], id: str) -> str | None:
    """The id of the config that another one lies in; overrides such as ``backbone::path`` are ids of their own."""
    return max((known for known in config if id == known or id.startswith(known + ID_SEP_KEY)), key=len, default=None)


def _without_macros(value: Any, folder: Path) -> Any:
    """What macros that name a file stand for; others are MONAI's to resolve when the bundle runs."""
    if isinstance(value, str) and value.startswith(MACRO_KEY):
        file, name = ConfigParser.split_path_id(value[len(MACRO_KEY) :])
        if file:
            pieces = read_object(folder / file, REMEDY)
            if name not in pieces:
                raise ValueError(f"{value}: {folder / file} has no {name!r}; it has {', '.join(pieces)}")
            return _without_macros(copy.deepcopy(pieces[name]), folder)
    if isinstance(value, dict):
        return {key: _without_macros(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_macros(item, folder) for item in value]
    return value


def _order(path: Path) -> list[str]:
    return [id for ids in read_object(path, REMEDY).values() for id in ids] if path.is_file() else []


def _sorted(config: Any, order: Sequence[str], inside: str = "") -> Any:
    """Ids in the order that all bundles keep, in ``train`` and ``validate`` too."""
    if not isinstance(config, dict) or "_target_" in config:
        return config
    places = {id: place for place, id in enumerate(order)}
    keys, last = {}, -1
    for key in config:
        last = places.get(inside + key, last)
        keys[key] = last
    return {
        key: _sorted(config[key], order, f"{inside}{key}{ID_SEP_KEY}") for key in sorted(config, key=keys.__getitem__)
    }
