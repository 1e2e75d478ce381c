"""A file appears whole or not at all, with a full disk, an error or a kill in between."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import monai_petl
from monai_petl.files.atomic import all_written_whole, partial_folder, write_text, written_whole

CODE = """
import os, signal, sys
from monai_petl.files.atomic import written_whole
with written_whole(sys.argv[1]) as part:
    part.write_text("half", encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def half(path: Path, error: Exception) -> None:
    with written_whole(path, "the table") as part:
        part.write_text("half", encoding="utf-8")
        raise error


def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "old")
    with pytest.raises(ZeroDivisionError):
        half(tmp_path / "deep" / "a.txt", ZeroDivisionError())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.txt"]
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "old"


def test_a_full_disk_says_what_is_free_and_that_the_former_file_is_kept(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(
        OSError, match=r"cannot write the table to .*a\.txt: No space.* MiB are free.* former file is kept"
    ):
        half(tmp_path / "a.txt", OSError(28, "No space left on device"))
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"


def test_what_a_kill_leaves_is_no_result_and_goes_with_the_next_file(tmp_path):
    write_text(tmp_path / "a[1].txt", "old")
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "a[1].txt")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a[1].txt").read_text(encoding="utf-8") == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write_text(tmp_path / "a[1].txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a[1].txt"]


def test_files_have_the_users_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
        assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_place_that_cannot_be_made_is_named(tmp_path):
    Path(tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write the report to"):
        write_text(tmp_path / "file" / "a.txt", "x", "the report")


def test_what_is_needed_is_said_beside_what_is_free(tmp_path):
    with (
        pytest.raises(OSError, match=r"It needs 3\.0 MiB\. [\d,]+ MiB are free on that disk; make room"),
        written_whole(tmp_path / "a.pt", "the network", 3 * 2**20),
    ):
        raise OSError(28, "No space left on device")


def test_a_link_goes_on_to_point_to_the_file(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.txt").symlink_to(tmp_path / "disk" / "b.txt")
    for text in ("first", "second"):
        write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").is_symlink()
        assert (tmp_path / "disk" / "b.txt").read_text(encoding="utf-8") == text


def test_names_as_long_as_file_systems_take_them_are_written(tmp_path):
    for name in ("n" * 250 + ".txt", "\N{GREEK SMALL LETTER MU}" * 120 + ".txt"):
        write_text(tmp_path / name, "x")
    assert len(list(tmp_path.iterdir())) == 2


def test_who_writes_at_the_same_time_is_left_alone(tmp_path):
    """The process's own number says nothing: after a kill in a container the next process has the same one."""
    with written_whole(tmp_path / "a.txt") as first:
        first.write_text("first", encoding="utf-8")
        write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "first"
    (tmp_path / f".a.txt.{os.getpid()}.0123.partial").mkdir()
    write_text(tmp_path / "a.txt", "third")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_of_several_files_all_are_whole_or_none_is_there(tmp_path):
    def fill(error: bool) -> None:
        with all_written_whole(tmp_path / "adapter", "the adapter") as folder:
            (folder / "a").write_text(str(error), encoding="utf-8")
            if error:
                raise OSError(28, "No space left on device")
            (folder / "b").touch()

    fill(False)
    with pytest.raises(OSError, match=r"cannot write the adapter to .*adapter: No space left"):
        fill(True)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["a", "b"]
    assert (tmp_path / "adapter" / "a").read_text(encoding="utf-8") == "False"


def test_a_folder_that_is_made_has_the_users_usual_permissions(tmp_path):
    with partial_folder(tmp_path / "data") as folder:
        (folder / "data").mkdir()
        assert (folder / "data").stat().st_mode & 0o077 == 0o777 & ~os_umask() & 0o077


def os_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


WRITES = {"write_text", "write_bytes", "save", "savefig", "savez", "savez_compressed", "save_file"}
WHOLE = {"written_whole", "all_written_whole", "partial_folder", "new_dataset_folder", "TemporaryDirectory"}
ELSEWHERE = {  # writes within such a block of its caller, to memory, or to a folder that is removed at the end
    "files.atomic.write_text", "files.tensor_files.save_tensors", "methods.parts.peft_files._write",
    "data.phantom._write_nifti", "data.medmnist._write", "data.medmnist.make_medmnist_folder", "data.nifti_header",
    "bundle.toy_data", "bundle.exports", "compare.figures", "demo.report._save", "compare.schedule._run",
    "compare.run.run_plan", "compare.worker.run_job",  # save methods of this package
}  # fmt: skip


def in_place(tree: ast.AST, whole: bool = False, function: str = "") -> Iterator[tuple[str, int]]:
    """Calls that write a file outside of a block that moves it into place: function and line."""
    for node in ast.iter_child_nodes(tree):
        inside = whole
        if isinstance(node, ast.With):
            inside |= any(name(item.context_expr) in WHOLE for item in node.items)
        ours = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "write_text"
        if isinstance(node, ast.Call) and not inside and not ours and name(node) in WRITES:
            yield function, node.lineno
        if isinstance(node, ast.Call) and not inside and name(node) == "open":
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if any(set(mode) & set("wxa") and set(mode) <= set("wxatb+") for mode in modes):
                yield function, node.lineno
        yield from in_place(node, inside, node.name if isinstance(node, ast.FunctionDef) else function)


def name(node: ast.AST) -> str:
    called = node.func if isinstance(node, ast.Call) else node
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def test_nothing_in_the_package_is_written_in_place():
    root = Path(monai_petl.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for function, line in in_place(ast.parse(path.read_text(encoding="utf-8"))):
            if not {module, f"{module}.{function}"} & ELSEWHERE:
                found.append(f"{module}.{function}, line {line}")
    assert not found
