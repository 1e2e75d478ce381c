"""The committed configs are what the sources say, and the sources say each thing once."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import fire
import monai.bundle
import pytest
from monai.bundle.scripts import run

from monai_petl.bundle import root_cause
from monai_petl.bundle.render import render
from tests.bundles.helpers import BUNDLES, Bundle, named

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "bundle_sources"
BLOCK = 4  # lines in a row that are taken for a copy


def expressions(config: Any) -> int:
    """How many values are Python (``$``)."""
    if isinstance(config, dict | list):
        return sum(map(expressions, config.values() if isinstance(config, dict) else config))
    return isinstance(config, str) and config.startswith("$")


@pytest.mark.parametrize("bundle", BUNDLES, ids=named)
def test_the_committed_files_are_what_is_rendered(bundle: Bundle) -> None:
    texts = {
        bundle.path / "configs" / f"{name}.json": json.dumps(config, indent=4, ensure_ascii=False) + "\n"
        for name, config in render(SOURCES / f"{bundle.name}.json").items()
    }
    alike = SOURCES / "parts" / "files"
    texts |= {
        bundle.path / p.relative_to(alike): p.read_text(encoding="utf-8") for p in alike.rglob("*") if p.is_file()
    }
    for path, text in texts.items():
        assert path.read_text(encoding="utf-8") == text, f"{path} differs from what `make bundles` writes"
    assert sorted((bundle.path / "configs").iterdir()) == sorted(
        path for path in texts if path.parent.name == "configs"
    )


def test_every_bundle_has_a_page_and_every_part_is_used() -> None:
    pages = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in SOURCES.glob("*.json")}
    assert set(pages) == {bundle.name for bundle in BUNDLES}
    used = {name for page in pages.values() for name in page["parts"]} | {"order", "pieces"}
    assert {path.stem for path in (SOURCES / "parts").glob("*.json")} == used
    pieces = json.loads((SOURCES / "parts" / "pieces.json").read_text(encoding="utf-8"))
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.json"))
    assert [name for name in pieces if f'"%pieces.json::{name}"' not in text] == []


@pytest.mark.parametrize("bundle", BUNDLES, ids=named)
def test_a_page_has_at_most_150_lines_for_training(bundle: Bundle) -> None:
    section, counts = "", defaultdict(int)
    for line in (SOURCES / f"{bundle.name}.json").read_text(encoding="utf-8").splitlines():
        opens = re.match(r'    "([^"]+)": [{\[]', line)
        section = opens[1] if opens else section
        counts[section] += 1
    training = sum(count for section, count in counts.items() if "train" in section.split(", "))
    assert 0 < training <= 150


def test_little_stands_in_two_places(record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A line counts as a copy when it and its neighbours, four in a row, stand in another place too."""
    texts = {
        path: [
            line.strip().rstrip(",") for line in path.read_text(encoding="utf-8").splitlines() if re.search(r"\w", line)
        ]
        for path in SOURCES.rglob("*.json")
        if path.name != "order.json"
    }
    places = defaultdict(list)
    for path, lines in texts.items():
        for i in range(len(lines) - BLOCK + 1):
            places[tuple(lines[i : i + BLOCK])].append((path, i))
    copied = {(path, i + j) for at in places.values() if len(at) > 1 for path, i in at for j in range(BLOCK)}
    total = sum(map(len, texts.values()))
    share = len(copied) / total
    record_property("copied_lines", f"{len(copied)} of {total}")
    with capsys.disabled():
        print(f"\nsources of bundles: {len(copied)} of {total} lines ({share:.1%}) stand in more than one place")
    assert share <= 0.1


@pytest.mark.parametrize("bundle", BUNDLES, ids=named)
def test_ids_and_expressions_of_training_stay_few(bundle: Bundle, record_property: Any) -> None:
    for name in ("train", "pretrain"):
        path = bundle.path / "configs" / f"{name}.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            found = (len(config), expressions(config))
            record_property(f"{name} ids and expressions", str(found))
            assert found[0] <= 66
            assert found[1] <= 51


@pytest.mark.parametrize("bundle", BUNDLES, ids=named)
def test_a_misspelt_id_is_refused_from_the_command_line(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "run",
        "--config_file",
        f"{bundle.path}/configs/train.json",
        "--bundle_root",
        str(bundle.path),
        "--epoch",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", [str(Path(monai.bundle.__file__).with_name("__main__.py")), *words])
    with pytest.raises(Exception) as raised:  # noqa: PT011 (MONAI wraps it)
        fire.Fire({"run": run})  # as python -m monai.bundle does
    assert "has no id 'epoch', which --epoch would set; did you mean epochs?" in str(root_cause(raised.value))
    assert list(tmp_path.iterdir()) == []
