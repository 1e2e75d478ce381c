"""Rooms of the package: imports run downward, without a circle; files are small; tests mirror them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import monai_petl

PACKAGE = Path(monai_petl.__file__).parent
TESTS = Path(__file__).parent
ROOMS = [  # each may import from those above it in this list, and from its own line
    {"files"},
    {"core", "losses", "inferers", "data", "transforms"},
    {"networks"},
    {"methods", "weights"},
    {"handlers", "engines", "analysis", "inflation"},
    {"bundle"},
    {"compare"},
    {"demo", "cli"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports when it is imported itself."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda):  # imported when it is called
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "monai_petl":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)
        todo += ast.iter_child_nodes(node)


GRAPH = {name: {found for found in imports(path) if found != name} for name, path in MODULES.items()}


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_imports_run_downward() -> None:
    wrong = []
    for name, found in GRAPH.items():
        room = name.split(".")[1] if "." in name else ""
        for other in found:
            there = other.split(".")[1] if "." in other else ""
            if room in LEVEL and (there not in LEVEL or LEVEL[there] > LEVEL[room]):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_every_room_is_placed() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders | {"inflation"} == set(LEVEL)


def test_no_file_is_two_ideas() -> None:
    long = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in long.items() if count > 400} == {}


def test_the_folder_of_methods_holds_methods() -> None:
    homes = {method.__module__ for method in monai_petl.Method.registry.values()}
    files = {f"monai_petl.methods.{path.stem}" for path in (PACKAGE / "methods").glob("[!_]*.py")}
    assert files <= homes


@pytest.mark.parametrize(
    "folder", sorted(p for p in PACKAGE.rglob("*") if p.is_dir() and p.name != "__pycache__"), ids=str
)
def test_tests_mirror_the_package(folder: Path) -> None:
    assert list((TESTS / folder.relative_to(PACKAGE)).rglob("test_*.py"))
