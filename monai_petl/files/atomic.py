"""Files that appear whole or not at all: written beside their place and moved there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

__all__ = [
    "all_written_whole",
    "errors_in_a_sentence",
    "move_into_place",
    "partial_folder",
    "write_text",
    "written_whole",
]

LONGEST = 100  # bytes of a file's name in the name of its temporary folder; file systems take 255 in all
_own: set[Path] = set()  # temporary folders that this process is filling


@contextlib.contextmanager
def written_whole(path: str | os.PathLike, what: str = "the file", size: int | None = None) -> Iterator[Path]:
    """Gives a path to write to; the file takes its place when the block ends well, and the former one stays otherwise.

    The temporary file has the name of the file, so that writers who go by the ending work. Where ``path`` is a link, the file
    that it points to is replaced.

    Args:
        path: the file; missing folders are made.
        what: what is written, for the error.
        size: bytes that it needs, for the error.

    Raises:
        OSError: the place cannot be written to, or the disk is full; says that a former file is still there.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    with errors_in_a_sentence(path, what, size), partial_folder(path) as folder:
        yield folder / path.name
        move_into_place(folder / path.name, path)


@contextlib.contextmanager
def all_written_whole(folder: str | os.PathLike, what: str, size: int | None = None) -> Iterator[Path]:
    """Gives a folder for several files that belong together; all are whole before the first is moved to ``folder``.

    Raises:
        OSError: as :func:`written_whole`.
    """
    folder = Path(folder)
    with errors_in_a_sentence(folder, what, size), partial_folder(folder / "all") as parts:
        yield parts
        for part in sorted(parts.iterdir()):
            move_into_place(part, folder / part.name)


@contextlib.contextmanager
def partial_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A hidden folder beside ``path`` in which it can be made; it is gone at the end.

    What a process that was killed has left behind of the same ``path`` is removed first.

    Raises:
        OSError: the folder cannot be made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{os.fsencode(path.name)[:LONGEST].decode(errors='ignore')}."
    _remove_remains(path.parent, name)
    folder = path.parent / f"{name}{os.getpid()}.{uuid4().hex[:8]}.partial"
    _own.add(folder)  # before it is there, for other threads that clean up
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _own.discard(folder)


def move_into_place(part: Path, path: Path) -> None:
    """Put a file that is whole where it belongs, once the disk has it.

    Raises:
        OSError: the disk is full, or the place cannot be written to.
    """
    _flush(part)
    os.replace(part, path)
    with contextlib.suppress(OSError):  # not every file system can flush folders
        _flush(path.parent)


def write_text(path: str | os.PathLike, text: str, what: str = "the file") -> None:
    """Write a text as UTF-8, whole or not at all.

    Raises:
        OSError: as :func:`written_whole`.
    """
    with written_whole(path, what, len(text)) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def errors_in_a_sentence(path: Path, what: str, size: int | None = None) -> Iterator[None]:
    """Errors while ``path`` is written name it, the room there is, and say that a former file is kept.

    Raises:
        OSError: for any other ``OSError``.
    """
    kept = " The former file is kept." if path.is_file() else ""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {what} to {path}: {error.strerror or error}. {_room(path, size)}.{kept}"
        ) from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _room(path: Path, size: int | None) -> str:
    """How much is needed and free, and the remedy."""
    there = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    needed = "" if size is None else f"It needs {max(size / 2**20, 0.1):,.1f} MiB. "
    free = shutil.disk_usage(there).free / 2**20
    return f"{needed}{free:,.0f} MiB are free on that disk; make room or choose another folder"


def _remove_remains(parent: Path, name: str) -> None:
    """Temporary folders of this name that nobody fills any more."""
    for folder in parent.iterdir():
        owner = folder.name.removeprefix(name).split(".")[0]
        if folder.name.startswith(name) and folder.name.endswith(".partial") and owner.isdigit():
            abandoned = folder not in _own if int(owner) == os.getpid() else not _runs(int(owner))
            if abandoned and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's, or this system cannot tell
        return True
    return True
