"""The report: what it says, and that it says what was measured."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from monai_petl.compare import Results, markdown_table, write_report
from monai_petl.compare.figures import FRONT, cost_figure, tile
from tests.compare.test_schedule import plan, run


class Tables(HTMLParser):
    """Rows of the sortable tables, by the values that sorting reads; and every address that the page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.loaded: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.loaded += [given[name] for name in ("src", "href") if given.get(name)]
        if tag == "table":
            self._inside = given.get("class") == "sortable"
            if self._inside:
                self.tables.append([])
        if self._inside and tag == "tr":
            self.tables[-1].append([])
        if self._inside and tag == "td":
            self.tables[-1][-1].append(given["data-value"])


def results_of(folder: Path, *methods: str, **options) -> Results:
    schedule = run(plan(folder, *methods, **options), folder)
    return Results(schedule.plan.to_dict(), schedule.records, schedule.trials())


def report_of(results: Results, folder: Path, **options) -> str:
    results.save(folder)
    return write_report(results, folder, **options).read_text(encoding="utf-8")


def test_numbers_of_the_report_are_those_of_the_csv(tmp_path):
    page = report_of(results_of(tmp_path, "good", "level", "cheap", shots=(3, None), seeds=3), tmp_path)
    runs = pd.read_csv(tmp_path / "results.csv", dtype={"shots": str})
    tables = Tables(page).tables
    assert len(tables) == 2
    for shots, table in zip(("3", "all"), tables, strict=True):
        rows = [row for row in table if row]
        assert [row[0] for row in rows] == ["good", "level", "cheap"]
        for method, *values in rows:
            these = runs[(runs["method"] == method) & (runs["shots"] == shots)]
            names = ["trained", "file_bytes", "peak_bytes", "saved_bytes", "flops", "step_seconds"]
            expected = [these["quality"].mean(), these["quality"].std(), 3, *(these[name].mean() for name in names)]
            assert [float(value) for value in values] == pytest.approx(expected)
    stored = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    first = next(row for row in stored["summary"] if (row["method"], row["shots"]) == ("good", "3"))
    assert first["quality"] == pytest.approx(float(tables[0][1][1]))


def test_the_page_needs_no_network(tmp_path):
    page = report_of(results_of(tmp_path, "good", seeds=1), tmp_path)
    assert all(address.startswith("data:") for address in Tables(page).loaded)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


def test_a_tie_is_called_a_tie_and_the_smaller_is_advised(tmp_path):
    advice = results_of(tmp_path, "good", "level", "cheap", seeds=3).advice(None)
    assert (advice["best"], advice["ties"], advice["behind"], advice["take"]) == ("good", ["level"], ["cheap"], "level")
    assert "The runs do not tell it from level (by 0.00" in advice["text"]
    assert "Behind it are cheap (by 0." in advice["text"]
    assert "Take level: it trains 10,000 values, in a file of 40 kB, the fewest of those within 0.02" in advice["text"]
    assert "memory" not in advice["text"]  # level needs the least of that too


def test_a_clear_winner_is_advised(tmp_path):
    advice = results_of(tmp_path, "good", "cheap", seeds=3).advice(None)
    assert advice["take"] == advice["best"] == "good"
    assert "Take good: it trains 1,000,000 values, in a file of 4.0 MB, and scores highest." in advice["text"]


def test_a_tie_that_may_be_for_want_of_trainings_is_not_taken_for_equality(tmp_path):
    one = results_of(tmp_path, "good", "cheap", seeds=2)
    lift = {0: 0.0, 1: 0.3}  # one training of the cheap one happens to be good
    records = [
        {**r, "cases": {c: v + lift[r["seed"]] * (r["method"] == "cheap") / 2 for c, v in r["cases"].items()}}
        for r in one.records
    ]
    records = [{**r, "quality": sum(r["cases"].values()) / len(r["cases"])} for r in records]
    advice = Results(one.plan, records).advice(None)
    assert (advice["ties"], advice["take"]) == (["cheap"], "good")
    assert "More seeds would tell more of the ties apart." in advice["text"]
    assert Results({**one.plan, "margin": 0.2}, records).advice(None)["take"] == "cheap"


def test_what_failed_is_shown_with_the_reason(tmp_path):
    results = results_of(tmp_path, "good", "breaks", seeds=2)
    page = report_of(results, tmp_path)
    assert page.count("ValueError: this method cannot") == 2
    assert "(2 failed)" in page
    row = next(row for row in Tables(page).tables[0] if row and row[0] == "breaks")
    assert row[1:3] == ["", ""]


def test_nothing_but_failures(tmp_path):
    page = report_of(results_of(tmp_path, "breaks", seeds=1), tmp_path)
    assert "No run ended with a score, so there is nothing to advise." in page
    assert "this method cannot" in page


@pytest.mark.parametrize("count", [1, 10])
def test_one_method_and_ten(tmp_path, count):
    one = results_of(tmp_path, "good", "cheap", shots=(3, None), seeds=2)
    names = [f"method {i}" for i in range(count)]
    records = [
        {**record, "method": name, "quality": record["quality"] + 0.01 * i, "trained": record["trained"] * 3**i}
        for i, name in enumerate(names)
        for record in one.records
        if record["method"] == "good"
    ]
    results = Results({**one.plan, "methods": {name: {} for name in names}}, records)
    page = report_of(results, tmp_path)
    assert [row[0] for row in Tables(page).tables[0] if row] == names
    assert page.count("<svg") == 8  # three costs for each number of cases, scores over cases, losses
    for name in names:
        assert page.count(f">{name}</text>") + page.count(f"{name}</text>") >= 6


def test_missing_values(tmp_path):
    one = results_of(tmp_path, "good", "cheap", seeds=2)
    gaps = {"peak_bytes": None, "file_bytes": None, "flops": None, "cases": {}, "curve": []}
    records = [{**r, **gaps, "quality": math.nan if r["method"] == "cheap" else r["quality"]} for r in one.records]
    page = report_of(Results(one.plan, records), tmp_path)
    rows = {row[0]: row[1:] for row in Tables(page).tables[0] if row}
    assert rows["cheap"][0] == ""
    assert rows["good"][4:6] == ["", ""]
    text = re.sub(r"<(svg|script).*?</\1>", "", page, flags=re.S)
    assert not re.search(r"\bnan\b|None", text)


def test_learning_rates_tried_are_listed(tmp_path):
    results = results_of(tmp_path, "good", "cheap", seeds=1, trials=2)
    page = report_of(results, tmp_path)
    listed = page[page.index("Learning rates tried") :]
    assert listed.count("<td>0.3</td>") == 2
    assert "with the same budget for the search" in page


def test_results_come_back_from_their_file(tmp_path):
    results = results_of(tmp_path, "good", "cheap", seeds=2)
    results.save(tmp_path)
    again = Results.load(tmp_path / "results.json")
    pd.testing.assert_frame_equal(again.summary(), results.summary())
    assert again.advice(None) == results.advice(None)


def test_names_are_escaped(tmp_path):
    one = results_of(tmp_path, "good", seeds=1)
    name = "<script>alert(1)</script>"
    results = Results({**one.plan, "methods": {name: {}}}, [{**one.records[0], "method": name}])
    page = report_of(results, tmp_path, title="a & b", attribution="<b>us</b>")
    assert "<script>alert" not in page
    assert "<title>a &amp; b</title>" in page


def test_a_method_whose_trainings_failed_is_left_out_of_the_advice(tmp_path):
    advice = results_of(tmp_path, "uneven", "good", "cheap", seeds=3).advice(None)
    assert advice["best"] == advice["take"] == "good"
    assert "Left out, because trainings failed or have no score: uneven (1 of 3 trainings)." in advice["text"]


def test_without_scores_by_case_trainings_are_compared(tmp_path):
    one = results_of(tmp_path, "good", "cheap", seeds=3)
    records = [{**record, "cases": {}} for record in one.records]
    assert Results(one.plan, records).advice(None)["behind"] == ["cheap"]
    alone = Results(one.plan, [record for record in records if record["seed"] == 0]).advice(None)
    assert (alone["ties"], alone["behind"], alone["take"]) == ([], [], "good")
    assert "One training and no scores by case do not compare it with cheap." in alone["text"]


def test_the_learning_rate_that_was_taken_is_in_the_table(tmp_path):
    page = report_of(results_of(tmp_path, "good", "cheap", seeds=1, trials=2), tmp_path)
    assert [row[-1] for row in Tables(page).tables[0] if row] == ["1.0", "0.3"]


def test_names_are_not_typeset(tmp_path):
    one = results_of(tmp_path, "good", seeds=2)
    for name in (r"lr $\foo$", "_hidden"):
        results = Results({**one.plan, "methods": {name: {}}}, [{**record, "method": name} for record in one.records])
        assert report_of(results, tmp_path).count(name.replace("\\", "\\")) > 4


def test_methods_of_different_tasks_are_refused(tmp_path):
    one = results_of(tmp_path, "good", "cheap", seeds=1)
    records = [{**record, "metric": f"val_{record['method']}"} for record in one.records]
    with pytest.raises(ValueError, match=r"of different tasks cannot be compared: .*good by val_good"):
        Results(one.plan, records)


def test_results_are_json_also_where_a_score_is_none(tmp_path):
    one = results_of(tmp_path, "good", seeds=1)
    Results(one.plan, [{**one.records[0], "quality": math.nan, "curve": [math.nan]}]).save(tmp_path)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["runs"][0]["quality"] is None
    assert found["runs"][0]["curve"] == [None]


def segmentation_pictures(folder: Path) -> None:
    random = np.random.default_rng(0)
    for method, shift in (("good", 0), ("cheap", 3)):
        label = np.zeros((20, 30), np.uint8)
        label[4:9, 5:12] = 1
        arrays = {"image_0": random.integers(0, 255, (20, 30, 1), np.uint8), "label_0": label}
        arrays |= {"pred_0": np.roll(label, shift, 0), "names": np.array(["case4"])}
        np.savez(folder / "runs" / f"test_{method}_all_seed0.npz", **arrays)


def test_methods_are_shown_on_the_same_case(tmp_path):
    results = results_of(tmp_path, "good", "cheap", seeds=2)
    segmentation_pictures(tmp_path)
    results.records[0]["class_names"] = ["hippocampus"]
    page = report_of(results, tmp_path, attribution="Images: us, CC BY 4.0.")
    assert page.count('src="data:image/png') == 4
    for title in ("image", "reference", "good", "cheap"):
        assert f'alt="case4, {title}"' in page
    assert "</i>hippocampus" in page
    for record in results.records:
        if record["seed"] == 0:
            assert f"{record['method']}<br>{record['cases']['case4']:.3f}" in page
    assert "Images: us, CC BY 4.0." in page


def test_answers_of_classification_are_shown_beside_the_reference(tmp_path):
    results = results_of(tmp_path, "good", "cheap", "level", seeds=1)
    results.records[0]["class_names"] = ["benign", "malignant"]
    for method, scores in (("good", [0.9, 0.1]), ("cheap", [0.2, 0.8]), ("level", [1.0])):
        arrays = {"image_0": np.zeros((8, 8, 3), np.uint8), "label_0": np.array([0.0]), "pred_0": np.array(scores)}
        arrays["names"] = np.array(["a.png"])
        np.savez(tmp_path / "runs" / f"test_{method}_all_seed0.npz", **arrays)
    page = report_of(results, tmp_path)
    assert "reference: benign" in page
    assert re.search(r'<td>good</td><td class="text">benign \(0\.90\)</td>', page)
    assert re.search(r'<td>level</td><td class="text wrong">malignant</td>', page)  # a class number
    assert re.search(r'<td>cheap</td><td class="text wrong">malignant \(0\.80\)</td>', page)


def test_a_table_in_markdown_has_the_numbers_of_the_csv(tmp_path):
    results = results_of(tmp_path, "good", "breaks", shots=(3, None), seeds=2)
    head, rule, good, breaks = markdown_table(results).splitlines()
    assert head.startswith("| method | trained | 3 labelled | all labelled | s a step |")
    assert rule.count("---") == head.count("|") - 1
    runs = results.runs()
    for shots, cell in zip(("3", "all"), good.split("|")[3:5], strict=True):
        quality = 100 * runs[(runs["method"] == "good") & (runs["shots"] == shots)]["quality"].astype(float)
        assert cell.strip() == f"{quality.mean():.1f} ± {quality.std():.1f}"
    assert good.split("|")[2].strip() == "1,000,000"
    assert breaks == "| `breaks` | - | - | - | - | - | - | - |"
    assert "0." in markdown_table(results, percent=False).splitlines()[2].split("|")[3]


def test_a_table_in_markdown_shows_other_metrics_too(tmp_path):
    results = results_of(tmp_path, "good", "breaks", shots=(3, None), seeds=2)
    for record in results.records:
        if record["status"] == "done":
            record["metrics"] = {"val_auc": 0.5 + 0.2 * record["seed"] + (0.1 if record["shots"] is None else 0)}
    head, _, good, breaks = markdown_table(results, also=("val_auc",)).splitlines()
    assert "| all labelled | auc, 3 labelled | auc, all labelled | s a step |" in head
    assert [cell.strip() for cell in good.split("|")[5:7]] == ["60.0 ± 14.1", "70.0 ± 14.1"]
    assert [cell.strip() for cell in breaks.split("|")[5:7]] == ["-", "-"]


def test_points_of_the_front_are_filled():
    table = pd.DataFrame(
        {
            "method": ["a", "b", "c"],
            "quality": [0.5, 0.7, 0.6],
            "spread": [0.1, math.nan, 0.0],
            "trained": [1.0, 100.0, 1000.0],
        }
    )
    drawn = cost_figure(table, "trained", "dice")
    assert drawn.startswith("<svg")
    assert "currentColor" in drawn
    assert [name for name in "abc" if f">{name}</text>" in drawn] == ["a", "b", "c"]
    marks = re.findall(
        r'<use [^>]*style="fill: (#\w+|none); stroke: (#\w+)"', drawn.replace("fill-opacity: 0", "fill: none")
    )
    filled = [fill for fill, stroke in marks if stroke.lower() == FRONT.lower() and fill.lower() == FRONT.lower()]
    assert len(filled) == 2


def test_a_tile_has_the_colours_of_its_classes():
    image = np.full((4, 6, 1), 100, np.uint8)
    label = np.zeros((4, 6), np.uint8)
    assert tile(image) == tile(image, label)
    label[0, 0] = 2
    assert tile(image) != tile(image, label)
