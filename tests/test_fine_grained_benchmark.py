"""What FPT and FPT+ cost at 512 pixels: the record keeps the limits, the pages show it, and the code still costs as much."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
from torch import Tensor

from monai_petl.data import FeatureCache

pytest.importorskip("pandas")
REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import fine_grained  # noqa: E402
import results  # noqa: E402
from fine_grained import EAGER, EAGER_SIDE, FUSED, LIMITS, STORED  # noqa: E402

RECORD = json.loads((REPOSITORY / "benchmarks" / "results" / "fine_grained.json").read_text(encoding="utf-8"))
ROWS = RECORD["rows"]
PAGE, README = (
    (REPOSITORY / name).read_text(encoding="utf-8") for name in ("docs/methods/fpt.md", "benchmarks/README.md")
)


@pytest.mark.parametrize("name", LIMITS)
def test_the_record_keeps_the_limits(name):
    kept, share, peak = LIMITS[name]
    assert RECORD["image"] == 512
    assert ROWS[name]["kept"] / 2**20 <= kept
    assert ROWS[name]["kept"] / ROWS[EAGER]["kept"] <= share
    assert ROWS[name]["peak"] / ROWS[EAGER]["peak"] <= peak


def test_all_peaks_but_one_are_measured():
    assert RECORD["batch"] == 16
    assert {name for name, row in ROWS.items() if row["measured_at"] < 16} == {EAGER}


def test_the_pages_show_the_record():
    memory = fine_grained.memory_table(ROWS, RECORD["batch"])
    epochs = fine_grained.epoch_table(RECORD["epochs"], RECORD["images"])
    for table in (memory, epochs):
        assert table in PAGE
        assert table in README
    assert fine_grained.step_table(RECORD["seconds"]) in README
    assert fine_grained.reading_of(RECORD) in " ".join(README.split())


@pytest.mark.parametrize("method", ["fpt_plus", "fpt", "lora", "full", "head", "side"])
def test_the_page_shows_what_trainings_took(method):
    runs = [run for run in results.results("busi_large").records if run["method"] == method]
    steps, whole = mean(run["steps"] * run["step_seconds"] for run in runs), [run["run_seconds"] for run in runs]
    cells = [results.score("busi_large", method), f"{steps:.0f}", f"{min(whole):.0f} to {max(whole):.0f}"]
    assert f"| `{method}` | {' | '.join(cells)} |" in PAGE


def test_the_page_shows_what_was_found_on_radiographs():
    assert results.score("cxr_large", "fpt_plus, 504 px") == "100.0 ± 0.0"
    for method in ("fpt_plus", "side"):
        assert f"{results.score('cxr_large', method)} %" in PAGE


def test_the_page_shows_what_a_blank_small_image_costs():
    """And no less than three seeds, with the uncertainty of a single figure."""
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "kept_tokens.json").read_text(encoding="utf-8"))
    scores = [100 * score for score in record["blank"]]
    assert len(scores) == 3
    assert f"{mean(scores):.1f} ± {stdev(scores):.1f} %, three seeds" in PAGE
    assert f"uncertain by {100 * record['standard_error']:.1f} points" in PAGE


@pytest.mark.parametrize("name", [EAGER, *(kind.format(m) for kind in (STORED, EAGER_SIDE) for m in ("FPT", "FPT+"))])
def test_a_step_keeps_what_was_recorded(name):
    assert fine_grained.rows_of(512, "cpu")[name]().kept() == pytest.approx(ROWS[name]["kept"], rel=1e-3)


@pytest.mark.parametrize(("method", "mebibytes"), [("FPT", 57.7), ("FPT+", 13.3)])
def test_with_attention_written_out_the_side_network_keeps_what_the_published_one_does(method, mebibytes):
    assert ROWS[EAGER_SIDE.format(method)]["kept"] / 2**20 == pytest.approx(mebibytes, rel=0.05)


def test_the_peak_of_a_step_on_stored_features_is_what_was_recorded():
    name = STORED.format("FPT+")
    assert fine_grained.rows_of(512, "cpu")[name]().peak(16) == pytest.approx(ROWS[name]["peak"], rel=1e-2)


def test_epochs_read_features_and_images_from_files(monkeypatch):
    """Of the five images in the folder all are stored, and each image of a stored batch is read."""
    found: list[str] = []
    read = FeatureCache.read
    monkeypatch.setattr(FeatureCache, "read", lambda cache, image: found.append(image) or read(cache, image))

    seen: list[Tensor] = []
    full = SimpleNamespace(step=seen.extend)
    small = json.loads((fine_grained.BUNDLE / "configs" / "small.json").read_text(encoding="utf-8"))
    sizes = {
        name: value for name, value in small.items() if name.endswith(("size", "_dim", "_heads", "layers", "width"))
    }
    sizes.pop("batch_size")
    epochs = fine_grained.epochs_of(full, 1, "cpu", sizes)
    turns = 2  # one to warm up
    assert len(found) == turns * sum(epochs[STORED.format(method)]["images"] for method in ("FPT", "FPT+"))
    assert epochs["FPT, storing"]["images"] == 5
    assert [tuple(image.shape) for image in seen] == [(4, 3, 64, 64)] * turns
    assert all(seconds > 0 for name, row in epochs.items() for seconds in row["step"] if name != FUSED)
