"""Paired differences and the Pareto front."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_petl.compare import efficiency, paired_difference, pareto_front


def scores(level: float, noise: float, seeds: int = 3, cases: int = 40, stream: int = 0) -> dict[int, dict[str, float]]:
    random = np.random.default_rng(stream)
    shared = np.random.default_rng(99).normal(0, 0.2, cases)  # hard and easy cases are so for all methods
    return {
        s: {f"c{i}": float(level + shared[i] + noise * random.normal()) for i in range(cases)} for s in range(seeds)
    }


def test_a_clear_difference_is_seen_through_the_spread_of_cases():
    found = paired_difference(scores(0.8, 0.02, stream=1), scores(0.75, 0.02, stream=2))
    assert found.mean == pytest.approx(0.05, abs=0.01)
    assert 0.03 < found.low < found.mean < found.high < 0.07
    assert not found.tie
    assert (found.seeds, found.cases) == (3, 40)


def test_equal_methods_are_a_tie():
    assert paired_difference(scores(0.8, 0.02, stream=1), scores(0.8, 0.02, stream=2)).tie


def test_trainings_that_contradict_each_other_are_a_tie():
    """Over cases alone the difference would be beyond doubt."""
    first, second = scores(0.8, 0.005, stream=1), scores(0.8, 0.005, stream=2)
    for seed, lift in enumerate((0.1, -0.08, 0.05)):
        first[seed] = {case: value + lift for case, value in first[seed].items()}
    assert paired_difference(first, second).tie
    assert not paired_difference({0: first[0]}, {0: second[0]}).tie


def test_turning_the_pair_around_turns_the_sign():
    first, second = scores(0.8, 0.02, stream=1), scores(0.78, 0.02, stream=2)
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 0.02])
def test_coverage_of_the_interval(seeds, of_seeds):
    """Where nothing differs but trainings and cases by chance, about one interval in twenty leaves out 0."""
    if seeds == 1 and of_seeds:
        pytest.skip("one training says nothing about others")
    random, wrong = np.random.default_rng(seeds), 0
    for _ in range(300):
        table = random.normal(0, of_seeds, (seeds, 1)) + random.normal(0, 0.02, (seeds, 15))
        first = {s: {str(c): table[s, c] for c in range(15)} for s in range(seeds)}
        wrong += not paired_difference(first, {s: dict.fromkeys(first[s], 0.0) for s in first}).tie
    assert wrong / 300 < 0.12


def test_scores_that_are_not_by_case_are_compared_over_trainings():
    """The interval of a t test of the differences."""
    first, second = {s: {"all": 0.8 + 0.01 * s} for s in range(3)}, {s: {"all": 0.7} for s in range(3)}
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(0.11)
    assert found.high - found.mean == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert paired_difference({0: {"all": 0.8}}, {0: {"all": 0.7}}) is None


def test_one_training_gives_the_interval_over_cases():
    first, second = scores(0.8, 0.02, seeds=1, stream=1), scores(0.78, 0.02, seeds=1, stream=2)
    differences = np.array([first[0][case] - second[0][case] for case in first[0]])
    found = paired_difference(first, second)
    assert found.high - found.mean == pytest.approx(2.0227 * differences.std(ddof=1) / 40**0.5, rel=1e-4)


def test_methods_that_score_the_same_everywhere_are_a_tie():
    assert paired_difference(scores(0.8, 0.0), scores(0.8, 0.0)).tie


def test_only_what_both_have_is_paired():
    first, second = scores(0.8, 0.02, seeds=3), scores(0.7, 0.02, seeds=2, cases=30)
    found = paired_difference(first, second)
    assert (found.seeds, found.cases) == (2, 30)
    assert paired_difference({}, second) is None
    assert paired_difference({0: {"a": 1.0}}, {0: {"a": 0.5}}) is None


def test_the_front():
    assert pareto_front([1, 2, 3, 2], [0.5, 0.7, 0.6, 0.6]) == [True, True, False, False]
    assert pareto_front([1, 1], [0.5, 0.5]) == [True, True]
    assert pareto_front([float("nan"), 1], [0.9, 0.5]) == [False, True]
    assert pareto_front([], []) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_a_point_is_on_the_front_unless_another_beats_it(points):
    costs, qualities = [p[0] for p in points], [p[1] for p in points]
    expected = [
        not any(c <= cost and q >= quality and (c < cost or q > quality) for c, q in points) for cost, quality in points
    ]
    assert pareto_front(costs, qualities) == expected
    assert any(expected)


@pytest.mark.parametrize(
    ("area", "parameters", "memory", "by_parameters", "by_memory"),
    [
        (88.82, 1.0, 1.0, 65.73, 65.73),
        (83.68, 0.0017, 0.8899, 83.62, 63.47),
        (84.14, 0.0203, 0.8371, 83.41, 64.61),
        (85.94, 0.0068, 0.9067, 85.69, 64.93),
        (86.40, 0.0181, 0.0789, 85.73, 83.60),
        (87.12, 0.0103, 0.0318, 86.73, 85.94),
    ],
    ids=["full fine-tuning", "prompt tuning", "adapter", "LoRA", "FPT", "FPT+"],
)
def test_scores_are_discounted_as_in_the_paper_on_fpt_plus(area, parameters, memory, by_parameters, by_memory):
    assert efficiency(area, parameters) == pytest.approx(by_parameters, abs=0.011)
    assert efficiency(area, memory) == pytest.approx(by_memory, abs=0.011)


def test_a_negative_share_is_refused():
    with pytest.raises(ValueError, match=r"share must be at least 0, got -0\.1"):
        efficiency(0.8, -0.1)
