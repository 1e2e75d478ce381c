"""Every check of a bundle in one go, offline: its files, its network, its configs on toy data, its exports."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from monai.utils import set_determinism

from monai_petl.bundle.checks import FILE_CHECKS, CheckError, SkippedError, check_schema
from monai_petl.bundle.errors import root_cause
from monai_petl.bundle.exports import EXPORTS
from monai_petl.bundle.folder import BundleFolder
from monai_petl.bundle.trials import TRIALS, Trial

__all__ = ["CHECKS", "Found", "Verification", "verify"]

RUNS = {**TRIALS, **EXPORTS}
CHECKS = (*FILE_CHECKS, "schema", *RUNS)


@dataclass(frozen=True)
class Found:
    """What a check found: ``passed``, ``failed`` or ``skipped``, and why."""

    check: str
    status: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Verification:
    """All checks of a bundle; ``str()`` is a table."""

    bundle: str
    found: tuple[Found, ...]

    @property
    def ok(self) -> bool:
        """Whether none has failed."""
        return not any(found.status == "failed" for found in self.found)

    def __getitem__(self, check: str) -> Found:
        return next(found for found in self.found if found.check == check)

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {"bundle": self.bundle, "ok": self.ok, "checks": [asdict(found) for found in self.found]}

    def __str__(self) -> str:
        return "\n".join([self.bundle, *(line_of(found) for found in self.found)])


def verify(
    bundle: str | os.PathLike,
    schema: str | os.PathLike | None = None,
    checks: tuple[str, ...] | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> Verification:
    """Run the checks of a bundle on a scratch copy of it.

    Trainings start from random weights, or from the bundle's own pre-training, with the ids of its ``configs/small.json``, on
    toy data. Nothing is downloaded, and nothing in the bundle's folder changes.

    Args:
        bundle: its folder.
        schema: file of the metadata's schema, ``meta_schema_20240725.json``; that check is skipped without it.
        checks: names from :data:`CHECKS`; default all.
        told: called with a line as each check ends.

    Returns:
        What was found, a check each.

    Raises:
        FileNotFoundError: there is no such bundle, or no such file of the schema.
        ValueError: there is no such check.
    """
    folder = BundleFolder(bundle)
    chosen = CHECKS if checks is None else checks
    unknown = [name for name in chosen if name not in CHECKS]
    if unknown:
        raise ValueError(f"there is no check {unknown[0]!r}; there are: {', '.join(CHECKS)}")
    path = None if schema is None else Path(schema).resolve()
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"no schema at {schema}")
    found: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="monai petl ") as scratch, _quietly(Path(scratch)):
        trial: list[Trial] = []
        for name in chosen:

            def act(name: str = name) -> None:
                if name == "schema":
                    check_schema(folder, path)
                elif name in FILE_CHECKS:
                    FILE_CHECKS[name](folder)
                else:
                    trial[:] = trial or [Trial(folder, Path(scratch))]
                    RUNS[name](trial[0])

            found.append(_found(name, act))
            told(line_of(found[-1]))
    return Verification(folder.name, tuple(found))


def line_of(found: Found) -> str:
    """A check in a line."""
    return f"  {found.status:<8}{found.check:<24}{found.seconds:6.1f} s  {found.detail}".rstrip()


def _found(name: str, act: Callable[[], None]) -> Found:
    start = time.perf_counter()
    status, detail = "passed", ""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            act()
    except CheckError as error:
        status, detail = "failed", str(error)
    except SkippedError as error:
        status, detail = "skipped", str(error)
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, KeyError):
            cause = ValueError(f"there is no {cause.args[0]!r}")
        status, detail = "failed", f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
    return Found(name, status, detail, time.perf_counter() - start)


@contextlib.contextmanager
def _quietly(elsewhere: Path) -> Iterator[None]:
    """Work in another folder without log lines, and leave the process as it was."""
    here, disabled, variables = Path.cwd(), logging.root.manager.disable, dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    deterministic, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.deterministic
    os.chdir(elsewhere)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        os.chdir(here)
        logging.disable(disabled)
        set_determinism(None)
        torch.use_deterministic_algorithms(deterministic)
        cudnn.benchmark, cudnn.deterministic = flags
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
