"""What do reading and building a published checkpoint cost over ``torch.load`` and the network's constructor?

Floor: ``torch.load``, the constructor and ``load_state_dict``, with the arguments known; each in an interpreter of its own.

    python benchmarks/load_backbone.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import fire
import torch
from common import markdown, report
from monai.networks.nets import SwinUNETR

SCRIPT = """
import json, resource, sys, time
import torch
from monai.networks.nets import SwinUNETR
import monai_petl
path, way = sys.argv[1:]
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
if way == "load_backbone":
    network = monai_petl.load_backbone(path)
else:
    state = torch.load(path, weights_only=True)
    network = SwinUNETR(1, 21, feature_size=48, use_v2=True)
    network.load_state_dict(state)
print(json.dumps([time.perf_counter() - start, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)]))
"""


def main(repeats: int = 5) -> None:
    """Seconds and peak memory beyond the libraries, by turns.

    Args:
        repeats: interpreters of each kind.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "VoComni_B.pt"
        torch.save(SwinUNETR(1, 21, feature_size=48, use_v2=True).state_dict(), path)
        size = path.stat().st_size
        runs: dict[str, list[list[float]]] = {"load_backbone": [], "floor": []}
        for _ in range(repeats):
            for way, found in runs.items():
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", SCRIPT, str(path), way],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {way: median(run[0] for run in found) for way, found in runs.items()}
    memory = {way: median(run[1] for run in found) / size for way, found in runs.items()}
    rows = [(way, f"{seconds[way]:.2f}", f"{memory[way]:.2f}") for way in runs]
    ratio = seconds["load_backbone"] / seconds["floor"]
    report(
        "load_backbone",
        [markdown(("way", "s", "peak, times the file"), rows)],
        f"A file of {size / 1e6:.0f} MB (SwinUNETR, use_v2, 21 classes) is read, recognised, built and loaded in "
        f"{seconds['load_backbone']:.2f} s, {ratio:.2f} times the floor (the target is 1.5), with a peak of "
        f"{memory['load_backbone']:.2f} times the file (the target is 2.3).",
        {"repeats": repeats, "bytes": size, "runs": runs},
    )


if __name__ == "__main__":
    fire.Fire(main)
