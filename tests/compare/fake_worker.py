"""Stands in for the worker: scores are a rule of method, rate, shots, seed and case; nothing is trained and torch not imported.

The method ``breaks`` fails, ``dies`` ends without a word, and ``slow`` waits until the file of its id ``gate`` is there.
"""

import json
import os
import sys
import time
import zlib
from pathlib import Path

LEVEL = {"uneven": 0.9, "good": 0.8, "level": 0.795, "cheap": 0.7, "slow": 0.6}
TRAINED = {"uneven": 50, "good": 1_000_000, "level": 10_000, "cheap": 100, "slow": 500}


def score(method: str, shots: int | None, seed: int, factor: float, case: str) -> float:
    noise = zlib.crc32(f"{method} {seed} {case}".encode()) / 2**32 - 0.5
    best = 0.3 if method == "cheap" else 1.0
    return LEVEL[method] + 0.04 * noise - 0.1 * (factor != best) - 0.2 / (shots or 20)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run, method = job["run"], job["run"]["method"]
    with Path(job["ids"]["diary"]).open("a", encoding="utf-8") as diary:
        diary.write(f"{Path(job['record']).stem} {os.environ['CUDA_VISIBLE_DEVICES'] or 'cpu'}\n")
    if method == "breaks":
        raise ValueError("this method cannot")
    if method == "dies":
        os.kill(os.getpid(), 9)
    while method == "slow" and not Path(job["ids"]["gate"]).exists():
        time.sleep(0.02)
    if method == "uneven" and run["seed"] > 0:
        raise ValueError("no second training")
    cases = {f"case{i}": score(method, run["shots"], run["seed"], run["factor"], f"case{i}") for i in range(12)}
    record = {
        "metric": "val_mean_dice",
        "quality": sum(cases.values()) / len(cases),
        "cases": cases,
        "curve": [1.0, 0.5, 0.4],
        "steps": 3,
        "clock": "processor time",
        "seconds": 1.5,
        "step_seconds": 0.5 + TRAINED[method] / 1e7,
        "trained": TRAINED[method],
        "parameters": 2_000_000,
        "file_bytes": 4 * TRAINED[method],
        "peak_bytes": 10_000_000 + 8 * TRAINED[method],
        "saved_bytes": 5_000_000,
        "flops": 3_000_000_000,
        "rates": {"lr": 0.001 * run["factor"]},
        "command": f"python -m monai.bundle run --method {method}",
        "device": "a processor",
        "threads": 1,
        "memory": "tensors alive in a step",
        "versions": {"torch": "2"},
        "date": "2026-01-01",
        "run_seconds": 2.0,
    }
    partial = Path(job["record"] + ".partial")
    partial.write_text(json.dumps({**run, "status": "done", **record}), encoding="utf-8")
    partial.replace(job["record"])


if __name__ == "__main__":
    main()
