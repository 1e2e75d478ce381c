"""Configs are put together from a page and parts by MONAI's rules, in one order, and what is wrong is said by file and id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monai_petl.bundle.render import render, render_all
from tests.conftest import Run

PIECES = {"flip": {"_target_": "RandFlipd", "prob": 0.5}, "both": ["%pieces.json::flip", {"_target_": "EnsureTyped"}]}
PART = {
    "train, pretrain": {
        "seed": 1,
        "sizes": [1, 2],
        "train": {},
        "train::handlers": [{"interval": 1}, "%pieces.json::flip"],
    },
    "train": {"epochs": 3, "options": {"rank": 8}},
    "evaluate": {"network::path": "@ckpt_path", "validate::handlers": [{"metrics": "dice"}]},
}


def sources(folder: Path, page: dict[str, Any], order: list[str] | None = None, **parts: Any) -> Path:
    """A folder of sources with one bundle."""
    (folder / "parts").mkdir(parents=True)
    for name, part in {"one": PART, "pieces": PIECES, **parts}.items():
        (folder / "parts" / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    (folder / "parts" / "order.json").write_text(json.dumps({"all": order or []}), encoding="utf-8")
    (folder / "mine_segmentation.json").write_text(json.dumps(page), encoding="utf-8")
    return folder / "mine_segmentation.json"


def rendered(folder: Path, section: dict[str, Any], config: str = "train", **more: Any) -> dict[str, Any]:
    return render(sources(folder, {"parts": ["one"], config: section}, **more))[config]


def test_the_page_comes_last_and_replaces_what_the_parts_say(tmp_path: Path) -> None:
    config = rendered(tmp_path, {"epochs": 5, "mine": True})
    assert config["epochs"] == 5
    assert config["seed"] == 1
    assert config["mine"] is True


def test_ids_reach_into_what_is_there_and_plus_adds(tmp_path: Path) -> None:
    config = rendered(
        tmp_path,
        {"train::handlers::0::interval": 2, "+sizes": [3], "+options": {"alpha": 4}, "+train::handlers": [{"more": 1}]},
    )
    assert config["train"]["handlers"] == [{"interval": 2}, PIECES["flip"], {"more": 1}]
    assert config["sizes"] == [1, 2, 3]
    assert config["options"] == {"rank": 8, "alpha": 4}


def test_macros_with_a_file_are_written_out_and_others_stay(tmp_path: Path) -> None:
    config = rendered(tmp_path, {"steps": "%pieces.json::both", "again": "%train::handlers"})
    assert config["steps"] == [PIECES["flip"], {"_target_": "EnsureTyped"}]
    assert config["again"] == "%train::handlers"


def test_a_piece_that_is_changed_in_one_place_stays_as_it_is_in_others(tmp_path: Path) -> None:
    config = rendered(tmp_path, {"a": "%pieces.json::flip", "b": "%pieces.json::flip", "a::prob": 1.0})
    assert (config["a"]["prob"], config["b"]["prob"]) == (1.0, 0.5)


def test_overrides_of_another_config_stay_ids_of_their_own(tmp_path: Path) -> None:
    config = rendered(tmp_path, {"validate::handlers::0::metrics": "iou", "trainer::amp": False}, "evaluate")
    assert config == {"network::path": "@ckpt_path", "validate::handlers": [{"metrics": "iou"}], "trainer::amp": False}


def test_a_config_that_is_named_only_behind_others_is_not_made(tmp_path: Path) -> None:
    page = {"parts": ["one"], "train": {}}
    assert set(render(sources(tmp_path / "without", page))) == {"train", "evaluate"}
    assert set(render(sources(tmp_path / "with", {**page, "pretrain": {"mode": 1}}))) == {
        "train",
        "evaluate",
        "pretrain",
    }


def test_ids_come_in_the_common_order_and_new_ones_behind_their_neighbour(tmp_path: Path) -> None:
    order = ["epochs", "seed", "train", "train::first", "train::handlers", "sizes"]
    config = rendered(tmp_path, {"epochs": 1, "beside_epochs": 2, "train::first": 0}, order=order)
    assert list(config) == ["epochs", "options", "beside_epochs", "seed", "train", "sizes"]
    assert list(config["train"]) == ["first", "handlers"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"train::trainer::amp": True}, "train::trainer::amp reaches into what is not there"),
        ({"+epochs": [1]}, r"\+epochs cannot be added to what is there"),
        ({"x": "%pieces.json::flop"}, r"%pieces.json::flop: .*pieces.json has no 'flop'; it has flip, both"),
        ({"x": "%other.json::flip"}, "there is no file .*other.json"),
    ],
    ids=["nowhere", "not a list", "unknown piece", "unknown file"],
)
def test_what_is_wrong_is_said_by_id_and_file(tmp_path: Path, section: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        rendered(tmp_path, section)


def test_a_missing_part_and_a_damaged_page_are_named(tmp_path: Path) -> None:
    page = sources(tmp_path, {"parts": ["one", "two"]})
    with pytest.raises(FileNotFoundError, match=r"two\.json"):
        render(page)
    page.write_text('{"parts": [', encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine_segmentation\.json is damaged"):
        render(page)


def test_only_what_differs_is_written_and_nothing_when_a_page_is_wrong(tmp_path: Path, run: Run) -> None:
    page = sources(tmp_path / "sources", {"parts": ["one"]}, files={})
    (tmp_path / "sources" / "parts" / "files").mkdir()
    (tmp_path / "sources" / "parts" / "files" / "LICENSE").write_text("free", encoding="utf-8")
    root = tmp_path / "bundles" / "mine_segmentation"
    assert sorted(render_all(tmp_path / "sources", tmp_path / "bundles")) == [
        root / "LICENSE",
        root / "configs" / "evaluate.json",
        root / "configs" / "train.json",
    ]
    text = (root / "configs" / "train.json").read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=4) + "\n"
    assert run("bundle", "render", tmp_path / "sources", tmp_path / "bundles") == "all configs are up to date\n"
    page.with_name("another_segmentation.json").write_text("{", encoding="utf-8")
    page.write_text(json.dumps({"parts": ["one"], "train": {"epochs": 9}}), encoding="utf-8")
    with pytest.raises(ValueError, match="another_segmentation"):
        render_all(tmp_path / "sources", tmp_path / "bundles")
    assert (root / "configs" / "train.json").read_text(encoding="utf-8") == text


def test_a_folder_without_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no page of a bundle in"):
        render_all(tmp_path, tmp_path)
