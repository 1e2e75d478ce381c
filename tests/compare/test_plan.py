"""What a comparison runs, and how the command line says it."""

from __future__ import annotations

import json

import pytest

from monai_petl.compare import Job, Plan
from monai_petl.compare.plan import FACTORS, parse_budget, parse_methods, parse_shots

METHODS = {"lora": {"method": "lora"}, "head": {"method": "head"}}


def test_every_method_runs_with_every_number_of_cases_and_every_seed():
    jobs = Plan("b", METHODS, (3, None), 2).jobs()
    assert {(job.method, job.shots, job.seed) for job in jobs} == {
        (method, shots, seed) for method in METHODS for shots in (3, None) for seed in (0, 1)
    }
    assert [job.seed for job in jobs] == [0] * 4 + [1] * 4  # a first answer early
    assert len({job.key for job in jobs}) == 8


def test_rates_are_tried_with_the_fewest_cases_and_the_first_seed():
    trials = Plan("b", METHODS, (None, 10, 3), 2, trials=3).tuning("lora")
    assert trials == [Job("tune", "lora", 3, 0, factor) for factor in FACTORS[:3]]
    assert len({job.key for job in trials}) == 3


def test_methods_are_names_or_a_file_of_ids(tmp_path):
    assert parse_methods("lora, head") == METHODS
    assert parse_methods(("lora", "head")) == METHODS
    file = tmp_path / "arms.json"
    file.write_text(json.dumps({"LoRA of rank 4": {"method": "lora", "method_options": {"rank": 4}}}), encoding="utf-8")
    assert parse_methods(str(file))["LoRA of rank 4"]["method_options"] == {"rank": 4}
    file.write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must hold \{label: \{id: value\}\}"):
        parse_methods(str(file))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3,10,all", (3, 10, None)), ((3, "all"), (3, None)), (5, (5,)), ("all", (None,)), ("3,3", (3,))],
)
def test_numbers_of_cases(text, expected):
    assert parse_shots(text) == expected


@pytest.mark.parametrize("text", ["0", "-3", "three", "3.5"])
def test_a_wrong_number_of_cases_is_refused(text):
    with pytest.raises(ValueError, match="positive whole numbers and 'all'"):
        parse_shots(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10min", (5, 600.0)),
        ("90s", (5, 90.0)),
        ("1.5h", (5, 5400.0)),
        (1, (1, float("inf"))),
        ("3", (3, float("inf"))),
    ],
)
def test_budgets(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["0", "9", "soon", "10 m", "-5min"])
def test_a_wrong_budget_is_refused(text):
    with pytest.raises(ValueError, match="--budget takes a time such as 90s, 10min or 2h"):
        parse_budget(text)


def test_a_folder_of_another_comparison_is_refused_with_what_differs(tmp_path):
    Plan("b", METHODS, settings={"epochs": 4}).save(tmp_path)
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(ValueError, match=r"differs in epochs \(4 there, 8 now\); give another folder as --out"):
        Plan("b", METHODS, settings={"epochs": 8}).save(tmp_path)
    with pytest.raises(ValueError, match="method lora"):
        Plan("b", {"lora": {"method": "lora", "rank": 2}}, settings={"epochs": 4}).save(tmp_path)
    assert (tmp_path / "plan.json").read_bytes() == before


def test_a_comparison_can_be_widened(tmp_path):
    Plan("b", METHODS, (3,), 1).save(tmp_path)
    Plan("b", {**METHODS, "full": {"method": "full"}}, (3, None), 3).save(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["seeds"] == 3


@pytest.mark.parametrize("wrong", [{"methods": {}}, {"shots": ()}, {"seeds": 0}, {"seeds": 2.5}])
def test_an_empty_comparison_is_refused(wrong):
    with pytest.raises(ValueError, match="at least one method, one number of labelled cases and one seed"):
        Plan(**{"bundle": "b", "methods": METHODS, **wrong})


def test_names_that_would_share_a_record_are_refused():
    with pytest.raises(ValueError, match="too alike"):
        Plan("b", {"a b": {}, "a-b": {}})


@pytest.mark.parametrize(
    "given", [{"settings": {"num_labelled": 3}}, {"methods": {"lora": {"method": "lora", "seed": 1}}}]
)
def test_what_the_comparison_sets_itself_is_refused(given):
    with pytest.raises(ValueError, match=r"(num_labelled|seed): the comparison sets this itself; use --shots"):
        Plan(**{"bundle": "b", "methods": METHODS, **given})
