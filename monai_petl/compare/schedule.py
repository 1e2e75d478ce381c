"""Runs what a plan still lacks, a process a run, on all devices at once; what fails is noted and the rest goes on."""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from monai_petl.compare.plan import Job, Plan
from monai_petl.compare.records import read_record, write_record

__all__ = ["Schedule", "find_devices"]

logger = logging.getLogger(__name__)

INTERRUPTED = "the comparison was interrupted; run it again to go on"


def find_devices(given: Sequence[str] | str | None = None) -> list[str]:
    """``"cuda:0,cuda:1"`` or ``"cpu,cpu"`` as a list: a run at a time on each. Default: every GPU, else the CPU.

    Raises:
        ValueError: there is no such device, or they are of two kinds, whose memory and time could not be compared.
    """
    if given is None:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    names = [name.strip() for name in (given.split(",") if isinstance(given, str) else given)]
    there = {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    unknown = [name for name in names if name not in there]
    if unknown or not names:
        raise ValueError(f"--devices: no {', '.join(unknown) or 'device'} here; there is {', '.join(sorted(there))}")
    if len({name == "cpu" for name in names}) > 1:
        raise ValueError(f"--devices: costs on {', '.join(names)} cannot be compared; give GPUs only, or CPUs only")
    return names


class Schedule:
    """Runs the jobs of a plan; records lie in ``FOLDER/runs``, one file each, and are not made again.

    Args:
        plan: what to run.
        folder: the comparison's.
        devices: see :func:`find_devices`.
        worker: the module that runs a job.
    """

    def __init__(
        self, plan: Plan, folder: Path, devices: Sequence[str], worker: str = "monai_petl.compare.worker"
    ) -> None:
        self.worker = worker
        self.plan = plan
        self.folder = folder
        self.devices: queue.Queue[str] = queue.Queue()
        self.width = len(devices)
        self.threads = max(1, (os.cpu_count() or 1) // max(1, sum(name == "cpu" for name in devices)))
        self._stopped = False
        self._running: set[subprocess.Popen] = set()
        for name in devices:
            self.devices.put(name)

    def run(self) -> list[dict[str, Any]]:
        """All records of the plan, of those that failed too, in the plan's order."""
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        with _alone(self.folder):
            return self._run_all()

    def _run_all(self) -> list[dict[str, Any]]:
        jobs = self.plan.jobs()
        with ThreadPoolExecutor(self.width) as pool, tqdm(total=len(jobs), desc="runs", disable=None) as bar:
            try:
                factors = dict(zip(self.plan.methods, pool.map(self._tune, self.plan.methods), strict=True))

                def run(job: Job) -> dict[str, Any]:
                    record = self._record(Job(job.phase, job.method, job.shots, job.seed, factors[job.method]))
                    bar.update()
                    return record

                return list(pool.map(run, jobs))
            except BaseException:
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    process.terminate()
                raise

    def trials(self) -> list[dict[str, Any]]:
        """The records of the learning rates that were tried."""
        paths = (self.path(job) for method in self.plan.methods for job in self.plan.tuning(method))
        return [read_record(path) for path in paths if path.exists()]

    def path(self, job: Job) -> Path:
        """Where the record of a job lies."""
        return self.folder / "runs" / f"{job.key}.json"

    def _tune(self, method: str) -> float:
        """The factor of the learning rates that scores best on the validation section, of those the budget allows."""
        if self.plan.trials == 1:
            return 1.0
        found: list[dict[str, Any]] = []
        spent = 0.0
        for job in self.plan.tuning(method):
            if found and not self.path(job).exists() and spent * (len(found) + 1) / len(found) > self.plan.seconds:
                break
            record = self._record(job)
            spent += record.get("run_seconds", 0)
            found.append(record)
        good = [record for record in found if record["status"] == "done" and record["quality"] is not None]
        return max(good, key=lambda record: record["quality"])["factor"] if good else 1.0

    def _record(self, job: Job) -> dict[str, Any]:
        path = self.path(job)
        record = _whole(path)
        if record and record["status"] == "done":
            if (record["ids"], record["section"]) == (self._ids(job), self._section(job)):
                return record
            logger.info("%s was made with other settings and is made again", path.stem)
        device = self.devices.get()
        try:
            return self._run(job, path, device)
        finally:
            self.devices.put(device)

    def _run(self, job: Job, path: Path, device: str) -> dict[str, Any]:
        work = self.folder / "work" / job.key
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        run = {**asdict(job), "ids": self._ids(job), "section": self._section(job)}
        pictured = job.phase == "test" and job.seed == 0
        description: dict[str, Any] = {
            "run": run,
            "begun": time.time(),
            "bundle": self.plan.bundle_of(job.method),
            "device": device,
            "ids": run["ids"],
            "factor": job.factor,
            "section": run["section"],
            "work": str(work),
            "record": str(path),
            "pictures": self.plan.pictures if pictured else 0,
            "picture_file": str(path.with_suffix(".npz")),
        }
        file, log = work / "job.json", path.with_suffix(".log")
        file.write_text(json.dumps(description, indent=1), encoding="utf-8")
        path.unlink(missing_ok=True)
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", self.worker, str(file)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=self._environment(device),
            )
            self._running.add(process)
            if self._stopped:  # while it was started
                process.terminate()
            try:
                code = process.wait()
            finally:
                self._running.discard(process)
        shutil.rmtree(work, ignore_errors=True)
        if self._stopped:
            raise InterruptedError(INTERRUPTED)
        if path.exists():
            record = read_record(path)
        else:
            record = {
                **run,
                "status": "failed",
                "error": _reason(log, code),
                "run_seconds": round(time.time() - description["begun"], 1),
            }
            write_record(path, record)
        told = record["error"] if record["status"] == "failed" else _told(record["quality"])
        shots = "all" if job.shots is None else job.shots
        phase = f"rates x {job.factor:g}, " if job.phase == "tune" else ""
        logger.info(
            "%s, %s labelled, seed %s: %s%s (%.0f s)", job.method, shots, job.seed, phase, told, record["run_seconds"]
        )
        return record

    def _ids(self, job: Job) -> dict[str, Any]:
        ids = {**self.plan.ids_of(job.method), "num_labelled": job.shots, "seed": job.seed}
        return json.loads(json.dumps(ids, default=str))

    def _section(self, job: Job) -> str:
        return "validation" if job.phase == "tune" else self.plan.section

    def _environment(self, device: str) -> Mapping[str, str]:
        visible = ""
        if device.startswith("cuda:"):
            allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            visible = device.removeprefix("cuda:")
            visible = allowed[int(visible)] if allowed else visible
        threads = {} if visible else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.threads))}
        return {**os.environ, "CUDA_VISIBLE_DEVICES": visible, **threads, "PYTHONUTF8": "1"}


def _whole(path: Path) -> dict[str, Any] | None:
    """The record of a run, where there is one that can be read."""
    try:
        return read_record(path) if path.exists() else None
    except ValueError as error:
        logger.warning("%s; this is done now", error)
        return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else runs a comparison in this folder."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"another comparison is running in {folder}; wait for it, or give another folder as --out"
        ) from None


def _told(quality: float | None) -> str:
    return "no finite score" if quality is None else f"{quality:.4f}"


def _reason(log: Path, code: int) -> str:
    """The last line of a traceback, or how the process ended."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code < 0:
        memory = "; out of memory, if nobody ended it" if code == -signal.SIGKILL else ""
        return f"ended by signal {-code}{memory} (see {log.name})"
    return lines[-1][:300] if lines else f"ended with {code}"
