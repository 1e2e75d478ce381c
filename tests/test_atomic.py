"""A file appears whole or not at all, with a full disk, an error or a kill in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from monai_petl.atomic import write_text, written_whole

CODE = """
import os, signal, sys
from monai_petl.atomic import written_whole
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
