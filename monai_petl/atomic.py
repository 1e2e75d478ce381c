"""Files that appear whole or not at all: written beside their place and moved there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["write_text", "written_whole"]


@contextlib.contextmanager
def written_whole(path: str | os.PathLike, what: str = "the file") -> Iterator[Path]:
    """Gives a path to write to; the file takes its place when the block ends well, and the former one stays otherwise.

    The temporary file lies in a hidden folder beside ``path`` and has its name, so that writers who go by the ending work.
    It is flushed to the disk before it is moved. What an earlier process that was killed has left behind is removed.

    Args:
        path: the file; missing folders are made.
        what: what is written, for the error.

    Raises:
        OSError: the place cannot be written to, or the disk is full; says that a former file is still there.
    """
    path = Path(path)
    kept = " The former file is kept." if path.is_file() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_remains(path)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise OSError(f"cannot write {what} to {path}: {error}.{kept}") from error
    part = folder / path.name
    try:
        yield part
        _flush(part)
        os.replace(part, path)
        _flush(path.parent)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"cannot write {what} to {path}: {error.strerror or error}. {free / 2**20:,.0f} MiB are free on that disk; make "
            f"room or choose another folder.{kept}"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str, what: str = "the file") -> None:
    """Write a text as UTF-8, whole or not at all.

    Raises:
        OSError: as :func:`written_whole`.
    """
    with written_whole(path, what) as part:
        part.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    """Let the disk have it before anything relies on it; not every file system can do so for folders."""
    flags = os.O_RDONLY
    with contextlib.suppress(PermissionError):
        handle = os.open(path, flags)
        try:
            if path.is_dir():
                with contextlib.suppress(OSError):
                    os.fsync(handle)
            else:
                os.fsync(handle)
        finally:
            os.close(handle)


def _remove_remains(path: Path) -> None:
    """Temporary folders of this file whose process is gone."""
    for folder in path.parent.glob(f".{_escaped(path.name)}.*.partial"):
        owner = folder.name.removeprefix(f".{path.name}.").split(".")[0]
        if folder.is_dir() and owner.isdigit() and not _runs(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's, or this system cannot tell
        return True
    return True
