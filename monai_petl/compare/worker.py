"""One run of a comparison in a process of its own: ``python -m monai_petl.compare.worker JOB.json``.

The bundle's train.json is run as it stands, with top-level ids overridden; then its own evaluator scores the trained network
on the section that the job names. What is measured goes into the job's record, which appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.engines import IterationEvents
from monai.utils.enums import CommonKeys

from monai_petl.bundle import root_cause, sentence_of
from monai_petl.compare.pictures import PictureTaker
from monai_petl.compare.plan import RATES
from monai_petl.compare.records import write_record
from monai_petl.core.summary import measure_step, summary

__all__ = ["run_job"]


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train and score.

    Args:
        job: ``bundle``, ``ids`` (all overridden ids but the rates), ``factor`` of the rates, ``section``, ``device``,
            ``work`` (a folder for what the bundle writes), ``pictures`` (how many), ``picture_file``.

    Returns:
        What was measured; see :mod:`monai_petl.compare.results` for the columns.
    """
    ids = {**job["ids"], **_rates(job)}
    ids |= {"ckpt_dir": f"{job['work']}/models", "output_dir": f"{job['work']}/eval"}
    placed = {"device": "$torch.device('cpu')"} if job["device"] == "cpu" else {}  # else a bundle may take Apple's GPU
    workflow = _workflow(job["bundle"], {**placed, **ids, "validate::datalist::section": job["section"]})
    parser = workflow.parser
    trainer, evaluator = (parser.get_parsed_content(f"{name}") for name in ("train::trainer", "validate::evaluator"))
    names = _names(parser.get_parsed_content("validate::dataset").data)
    if not names:
        raise ValueError(
            f"the section {job['section']!r} of the data holds no case to score; choose another by --section"
        )
    clock = _Clock(trainer)
    workflow.run()
    network = parser.get_parsed_content("adapted_network")
    adapter = Path(parser.get_parsed_content("adapter_path"))
    taker, answers = PictureTaker(evaluator, names, job["pictures"]), _Answers(evaluator)
    evaluator.run()
    if job["pictures"]:
        taker.save(job["picture_file"])
    metric = evaluator.state.key_metric_name
    counted = summary(network)
    record = {
        "metric": metric,
        "quality": float(evaluator.state.metrics[metric]),
        "metrics": {name: float(value) for name, value in evaluator.state.metrics.items() if np.ndim(value) == 0},
        "cases": _cases(evaluator, metric, names) or answers.cases(names),
        "curve": clock.curve,
        "steps": clock.steps,
        "clock": "processor time" if clock.one_thread else "time on the clock",
        "seconds": round(clock.seconds, 2),
        "step_seconds": round(float(np.median(clock.step_seconds)), 5),
        "trained": counted.trainable,
        "parameters": counted.total,
        "file_bytes": adapter.stat().st_size if adapter.is_file() else None,
        "class_names": list(
            parser.get_parsed_content("train::classes" if "classes" in parser.get("train", {}) else "class_names")
        ),
        "rates": {name: ids[name] for name in RATES if name in ids},
        "command": _command(job["bundle"], ids),
        **_step_cost(parser, trainer, evaluator),
        **_machine(),
    }
    workflow.finalize()
    return record


def _workflow(bundle: str, ids: Mapping[str, Any]) -> ConfigWorkflow:
    configs = Path(bundle) / "configs"
    workflow = ConfigWorkflow(
        config_file=str(configs / "train.json"),
        meta_file=str(configs / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=bundle,
        **ids,
    )
    workflow.initialize()
    return workflow


def _rates(job: Mapping[str, Any]) -> dict[str, float]:
    """The learning rates that the bundle gives the method, times the factor, and no validation before the end."""
    parser = ConfigParser()
    parser.read_config(str(Path(job["bundle"]) / "configs" / "train.json"))
    parser.update({"bundle_root": job["bundle"], **job["ids"]})
    rates = {name: job["factor"] * parser.get_parsed_content(name) for name in RATES if name in parser.get()}
    return {**rates, "val_interval": parser.get_parsed_content("epochs") + 1}


class _Clock:
    """Losses and seconds of a training; steps of one thread are in processor time, which other work does not stretch."""

    def __init__(self, trainer: Engine) -> None:
        self.one_thread = not torch.cuda.is_available() and torch.get_num_threads() == 1
        self._now = time.process_time if self.one_thread else time.perf_counter
        self.curve: list[float] = []  # mean loss of every epoch
        self.step_seconds: list[float] = []
        self.steps = 0
        self.seconds = 0.0
        self._losses: list[float] = []
        self._begun = self._step = 0.0
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, self._begin)
        trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, self._loss)
        trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, self._end)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        trainer.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self._begun = time.perf_counter()

    def _begin(self, engine: Engine) -> None:
        _synchronise()
        self._step = self._now()

    def _loss(self, engine: Engine) -> None:
        self._losses.append(float(engine.state.output[CommonKeys.LOSS].detach()))

    def _end(self, engine: Engine) -> None:
        _synchronise()
        self.step_seconds.append(self._now() - self._step)
        self.steps += 1

    def _epoch(self, engine: Engine) -> None:
        self.curve.append(round(float(np.mean(self._losses)), 5))
        self._losses.clear()

    def _finish(self, engine: Engine) -> None:
        self.seconds = time.perf_counter() - self._begun


class _Answers:
    """Whether each image was classified rightly, weighted so that the mean is the balanced accuracy."""

    def __init__(self, evaluator: Engine) -> None:
        self.answers: list[tuple[int, int]] = []
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._collect)

    def _collect(self, engine: Engine) -> None:
        for item in engine.state.output:
            label, pred = torch.as_tensor(item["label"]), torch.as_tensor(item["pred"])
            if label.numel() == 1 and pred.ndim == 1:
                self.answers.append((int(label), int(pred.argmax())))

    def cases(self, names: Sequence[str]) -> dict[str, float]:
        """Name -> 0, or images / (classes x images of its class); nothing where no class was predicted for each image."""
        if len(self.answers) != len(names):
            return {}
        count = Counter(label for label, _ in self.answers)
        weight = {label: len(names) / (len(count) * number) for label, number in count.items()}
        pairs = zip(names, self.answers, strict=True)
        return {name: weight[label] if said == label else 0.0 for name, (label, said) in pairs}


def _cases(evaluator: Engine, metric: str, names: Sequence[str]) -> dict[str, float]:
    """Score of every case: the mean of its finite scores over classes."""
    detail = getattr(evaluator.state, "metric_details", {}).get(metric)
    if detail is None or len(detail) != len(names):
        return {}
    scores = np.asarray(detail, dtype=float).reshape(len(names), -1)
    known = {name: row[np.isfinite(row)] for name, row in zip(names, scores, strict=True)}
    return {name: float(row.mean()) for name, row in known.items() if len(row)}


def _names(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each case: its path below the folder that all share, or its number."""
    paths = [str(item.get("image", "")) for item in items]
    if not paths or len(set(paths)) < len(paths) or not all(paths):
        return [str(i) for i in range(len(paths))]
    absolute = [os.path.abspath(path) for path in paths]
    shared = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [Path(os.path.relpath(path, shared)).as_posix() for path in absolute]


def _step_cost(parser: ConfigParser, trainer: Engine, evaluator: Engine) -> dict[str, Any]:
    """Cost of one more step on a batch of the training data; the trained network was scored before."""
    for engine in (trainer, evaluator):
        engine.state.output = engine.state.batch = None  # volumes that would count as memory of the step
    network, loss = parser.get_parsed_content("network").train(), parser.get_parsed_content("loss")
    device = torch.device(parser.get_parsed_content("device"))
    image, label, *more = trainer.prepare_batch(next(iter(parser.get_parsed_content("train::dataloader"))), device)
    args, kwargs = more or ((), {})

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, enabled=bool(parser.get_parsed_content("amp"))):
            return loss(network(image, *args, **kwargs), label)

    cost = measure_step(network, forward, parser.get_parsed_content("optimizer"), repeats=1)
    return {"peak_bytes": cost.peak_bytes, "saved_bytes": cost.saved_bytes, "flops": cost.flops}


def _command(bundle: str, ids: Mapping[str, Any]) -> str:
    config = shlex.quote(str(Path(bundle) / "configs" / "train.json"))
    given = " ".join(f"--{name} {shlex.quote(v if isinstance(v, str) else repr(v))}" for name, v in ids.items())
    return f"python -m monai.bundle run --config_file {config} --bundle_root {shlex.quote(bundle)} {given}"


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "memory": "largest memory allocated on the GPU" if gpu else "tensors alive in a step",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "monai": monai.__version__,
            "monai_petl": sys.modules["monai_petl"].__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(path: str) -> None:
    """Run the job of this file and write the record that it names."""
    logging.basicConfig(level=logging.WARNING)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    target = Path(job["record"])
    try:
        record = {"status": "done", **run_job(job)}
    except Exception as error:
        traceback.print_exc()
        record = {"status": "failed", "error": f"{type(root_cause(error)).__name__}: {sentence_of(error)}"[:500]}
    taken = {"run_seconds": round(time.time() - job["begun"], 1)}
    write_record(target, {**job["run"], **record, **taken})


if __name__ == "__main__":
    main(sys.argv[1])
