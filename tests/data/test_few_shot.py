"""Few-shot draws: what a shot is, what is left, and leaks between sections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_petl.data import (
    DataError,
    balancing_weights,
    few_shot_per_class,
    few_shot_split,
    find_leaks,
    positive_classes,
    require_disjoint,
)

NAMES = [f"finding {number}" for number in range(19)]


def single(counts=(30, 20), images_of_a_group: int = 2) -> list[dict]:
    return [
        {
            "image": f"{label}_{n}.png",
            "label": label,
            "class_name": f"c{label}",
            "group": f"{label}_{n // images_of_a_group}",
        }
        for label, count in enumerate(counts)
        for n in range(count)
    ]


def several(count: int = 400, images_of_a_group: int = 1, seed: int = 0) -> list[dict]:
    """As in ChestDR: 19 findings of different frequency, and a third of the images without any."""
    random = np.random.default_rng(seed)
    frequency = np.linspace(0.08, 0.2, len(NAMES))
    cases = []
    for n in range(count):
        label = (random.random(len(NAMES)) < frequency * (n % 3 > 0)).astype(np.float32)
        names = "|".join(NAMES[i] for i in np.flatnonzero(label))
        group = f"study{n // images_of_a_group}"
        cases.append({"image": f"{n}.png", "label": label, "class_name": names, "group": group})
    return cases


def images(cases: list[dict]) -> list[str]:
    return [case["image"] for case in cases]


def test_the_published_draw_has_as_many_lines_as_classes_times_shots() -> None:
    cases = several()
    for shots in (1, 5, 10):
        drawn, rest = few_shot_split(cases, shots, seed=3, published=True)
        assert len(drawn) == 19 * shots
        assert all(case["label"].any() for case in drawn)
        for place in range(19):
            assert all(case["label"][place] for case in drawn[place * shots : (place + 1) * shots])
        assert not set(images(drawn)) & set(images(rest))
        assert len(set(images(drawn))) + len(rest) == len(cases)
    assert len(set(images(drawn))) < len(drawn)  # an image drawn for two classes stands there twice


def test_a_rare_class_gives_all_that_it_has_as_published_and_is_named_otherwise() -> None:
    cases = single((30, 3))
    drawn, _ = few_shot_split(cases, 5, published=True)
    assert [case["label"] for case in drawn] == 5 * [0] + 3 * [1]
    with pytest.raises(
        DataError, match=r"5 images of each class were asked for, but there are 3 of c1; give a smaller"
    ):
        few_shot_split(cases, 5)
    with pytest.raises(DataError, match=r"5 groups of each class were asked for, but there are 2 of c1"):
        few_shot_split(cases, 5, unit="group")
    rare = several(30)
    with pytest.raises(DataError, match=r"10 images of each class were asked for, but there are .*of finding 1,"):
        few_shot_per_class(rare, 10)


@pytest.mark.parametrize("make", [single, several])
def test_groups_are_drawn_whole_and_never_lie_on_both_sides(make) -> None:
    cases = make(images_of_a_group=4)
    drawn, rest = few_shot_split(cases, 2, seed=1, unit="group")
    groups = {case["group"] for case in drawn}
    assert not groups & {case["group"] for case in rest}
    for label in range(2 if make is single else 19):
        found = {case["group"] for case in drawn if label in positive_classes(case)}
        assert len(found) >= 2
    if make is single:
        assert len(drawn) == 2 * 2 * 4
        assert len(groups) == 4


def test_a_file_that_stands_in_the_list_twice_lies_on_one_side() -> None:
    cases = single((6, 6), images_of_a_group=2)
    twice = [
        *cases,
        *({**case, "group": "another"} for case in cases[:1]),
        {**cases[5], "image": "x", "group": "another"},
    ]
    for seed in range(20):
        drawn, rest = few_shot_split(twice, 2, seed)
        assert not set(images(drawn)) & set(images(rest))
        if cases[0]["image"] in images(drawn):
            assert "x" not in images(rest)  # of a group that the file is in, too


@given(seed=st.integers(0, 2**31 - 1), shots=st.integers(1, 5), group=st.booleans())
def test_a_seed_draws_the_same_and_its_rest_shares_nothing(seed: int, shots: int, group: bool) -> None:
    cases, unit = several(200, 3, seed=5), "group" if group else "image"
    drawn, rest = few_shot_split(cases, shots, seed, unit=unit, published=True)
    again = few_shot_split(cases, shots, seed, unit=unit, published=True)
    assert images(drawn) == images(again[0])
    assert images(rest) == images(again[1])
    assert not find_leaks({"drawn": drawn, "rest": rest})


def test_the_draw_is_the_same_on_every_machine() -> None:
    drawn, _ = few_shot_split(single(), 2, seed=7)
    assert images(drawn) == ["0_12.png", "0_14.png", "1_14.png", "1_17.png"]


def test_what_a_shot_is_must_be_known() -> None:
    with pytest.raises(ValueError, match="unit must be 'image' or 'group', got 'patient'"):
        few_shot_split(single(), 1, unit="patient")
    with pytest.raises(ValueError, match="count must be positive, or None for all images, got 0"):
        few_shot_split(single(), 0)


def test_rare_findings_are_drawn_as_often_as_common_ones() -> None:
    cases = [
        {"image": f"{n}.png", "label": np.array(label, np.float32), "class_name": "", "group": str(n)}
        for n, label in enumerate([[1, 0], [1, 0], [1, 1], [0, 0], [0, 0]])
    ]
    assert balancing_weights(cases) == [1 / 3, 1 / 3, 1.0, 0.5, 0.5]
    assert balancing_weights(single((4, 2))) == 4 * [0.25] + 2 * [0.5]


def test_leaks_are_named(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one"), ("d", b"four"), ("e", b"other")):
        (tmp_path / f"{name}.png").write_bytes(content)

    def case(name: str, group: str | None = None) -> dict:
        return {"image": str(tmp_path / f"{name}.png"), "group": group or name}

    training = [case("a"), case("b", "patient 7")]
    assert find_leaks({"training": training, "test": [case("e")]}) == []
    for other, why in (
        (case("c"), "the same content"),
        (case("d", "patient 7"), "one group"),
        (case("a"), "the same file"),
    ):
        leaks = find_leaks({"training": training, "test": [case("e"), other]})
        assert [(leak[0], Path(leak[2]).name) for leak in leaks] == [(why, Path(other["image"]).name)]
    with pytest.raises(
        DataError, match=r"training and test share 2 images: .*c.png and .*a.png \(the same content\); .*d.png and"
    ):
        require_disjoint({"training": training, "test": [case("c"), case("d", "patient 7")]})
    require_disjoint({"training": training, "test": []})
