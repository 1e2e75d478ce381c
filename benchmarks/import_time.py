"""What does ``import monai_petl`` add to ``import monai``?

Floor: the libraries outside monai_petl that it imports and that ``import monai`` has not imported.

    python benchmarks/import_time.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median

import fire
from common import markdown, report

SCRIPT = """
import json, sys, time
start = time.process_time()
import monai
imported, before = time.process_time(), set(sys.modules)
for name in {libraries}:
    __import__(name)
libraries = time.process_time()
import monai_petl
end = time.process_time()
new = {{name for name in set(sys.modules) - before if not name.startswith("monai")}}
print(json.dumps({{"monai": imported - start, "libraries": libraries - imported, "monai_petl": end - imported,
                  "new": sorted(new), "modules": len(set(sys.modules) - before)}}))
"""


def main(repeats: int = 7) -> None:
    """Processor seconds in fresh interpreters.

    Args:
        repeats: number of interpreters.
    """
    libraries = _run([])["new"]
    runs = [_run(libraries) for _ in range(repeats)]
    seconds = {key: [run[key] for run in runs] for key in ("monai", "monai_petl", "libraries")}
    best = {key: min(values) for key, values in seconds.items()}
    labels = {
        "monai": "import monai",
        "monai_petl": "import monai_petl, on top",
        "libraries": "floor: other libraries in it",
    }
    rows = [(label, f"{1e3 * best[key]:.0f}", f"{1e3 * median(seconds[key]):.0f}") for key, label in labels.items()]
    report(
        "import_time",
        [markdown(("import", "ms, fewest", "ms, median"), rows)],
        f"`import monai_petl` adds {1e3 * median(seconds['monai_petl']):.0f} ms to `import monai` (the target is 200 ms), "
        f"{100 * median(seconds['monai_petl']) / median(seconds['monai']):.1f} % of it.",
        {"repeats": repeats, "seconds": seconds, "modules": runs[0]["modules"], "libraries": libraries},
    )


def _run(libraries: list[str]) -> dict:
    script = SCRIPT.format(libraries=libraries)
    return json.loads(
        subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True).stdout
    )


if __name__ == "__main__":
    fire.Fire(main)
