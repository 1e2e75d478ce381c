"""Where monai_petl is not installed, every way into a bundle says what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles.helpers import Bundle, Trained

MISSING_PACKAGE = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "monai_petl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""

ENTRY_POINTS = """
import sys, traceback
from monai.bundle import ckpt_export, load, run, verify_net_in_out
bundle, name = sys.argv[1:]
config, meta = f"{bundle}/configs/inference.json", f"{bundle}/configs/metadata.json"
entries = {
    "run": lambda: run(config_file=config),
    "train": lambda: run(config_file=f"{bundle}/configs/train.json"),
    "verify": lambda: verify_net_in_out("network_def", config_file=config, meta_file=meta),
    "export": lambda: ckpt_export("network_def", "model.ts", f"{bundle}/models/model.pt", meta, config),
    "load": lambda: load(name, bundle_dir=f"{bundle}/.."),
}
for label, entry in entries.items():
    print("ENTRY", label)
    try:
        entry()
        print("no error")
    except Exception:
        print(traceback.format_exc())
run(config_file=config)
"""


@pytest.mark.slow
def test_without_the_package_every_entry_point_says_what_to_install(
    each: Bundle, tmp_path: Path, trained: Trained
) -> None:
    (tmp_path / "sitecustomize.py").write_text(MISSING_PACKAGE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", ENTRY_POINTS, str(trained.bundle), each.name]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    parts = done.stdout.split("ENTRY ")[1:]
    assert [part.split()[0] for part in parts] == ["run", "train", "verify", "export", "load"], done.stderr
    for part in parts:
        assert "monai_petl" in part, part
        assert "pip install monai-petl" in part, part
        assert "no error" not in part, part
    assert done.returncode != 0
    assert "pip install monai-petl" in done.stderr
