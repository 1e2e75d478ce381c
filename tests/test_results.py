"""The page of results says what the recorded runs say, and every study can be run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

pytest.importorskip("pandas")
REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import feature_analysis  # noqa: E402
import kept_tokens  # noqa: E402
import prompt_ablation  # noqa: E402
import results  # noqa: E402
from studies import STUDIES  # noqa: E402

from monai_petl.compare.plan import Plan  # noqa: E402
from monai_petl.compare.records import read_record  # noqa: E402


def test_the_page_is_what_the_runs_say():
    page = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == results.rendered(), "write it anew: python benchmarks/results.py page"


@pytest.mark.parametrize(
    ("page", "module"),
    [("analysis.md", feature_analysis), ("methods/ept.md", prompt_ablation), ("methods/fpt.md", kept_tokens)],
)
def test_a_table_on_a_page_is_what_its_benchmark_recorded(page, module):
    record = REPOSITORY / "benchmarks" / "results" / f"{module.__name__}.json"
    table = module.table_of(json.loads(record.read_text(encoding="utf-8"))["rows"])
    assert table.strip() in (REPOSITORY / "docs" / page).read_text(encoding="utf-8")


def test_the_table_of_blocks_is_what_was_recorded():
    found = json.loads((REPOSITORY / "benchmarks" / "results" / "feature_analysis.json").read_text(encoding="utf-8"))
    assert feature_analysis.blocks_of(found["blocks"]) in (REPOSITORY / "docs" / "analysis.md").read_text(
        encoding="utf-8"
    )


RECORDED = {path.stem: path for path in (REPOSITORY / "benchmarks" / "results").glob("*.json")}
ON_PAGES = {module.__name__ for module in (feature_analysis, prompt_ablation, kept_tokens)}


def test_the_tables_of_the_benchmarks_are_those_that_were_recorded():
    shown = set(tables_in((REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")))
    records = {n: json.loads(path.read_text(encoding="utf-8")) for n, path in RECORDED.items() if n not in ON_PAGES}
    recorded = {table: n for n, found in records.items() for text in found["tables"] for table in tables_in(text)}
    assert set(recorded.values()) == records.keys()
    assert {recorded[table] for table in recorded.keys() - shown} == set(), "the page has other figures of these"
    assert shown - recorded.keys() == set(), "nobody recorded these tables"


def tables_in(text: str) -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", f"{text}\n", flags=re.MULTILINE)


def test_every_study_was_run_and_every_record_is_of_a_study():
    recorded = {path.stem for path in results.RECORDS.glob("*.json")} - {"choices"}
    assert recorded == set(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_a_record_is_that_of_its_study(name):
    study, found = STUDIES[name], results.results(name)
    named = {
        label: {**ids, "bundle": f"bundles/{ids['bundle']}"} if "bundle" in ids else ids
        for label, ids in study.methods.items()
    }
    assert found.plan["methods"] == json.loads(json.dumps(named))
    assert found.shots == list(study.shots)
    settings = {key: found.plan["settings"][key] for key in study.settings}
    assert settings == json.loads(json.dumps(dict(study.settings)))
    wanted = {(m, s, seed) for m in study.methods for s in study.shots for seed in range(study.seeds)}
    assert {(r["method"], r["shots"], r["seed"]) for r in found.records} == wanted
    assert all(r["status"] == "done" for r in found.records)


@pytest.mark.parametrize("name", STUDIES)
def test_the_ids_of_a_study_are_those_of_its_bundle(name):
    study = STUDIES[name]
    for ids in study.methods.values():
        parser, bundle = ConfigParser(), ids.get("bundle", study.bundle)
        parser.read_config(str(REPOSITORY / "bundles" / bundle / "configs" / "train.json"))
        assert {*study.settings, *ids} - {"bundle"} <= set(parser.get())


@pytest.mark.parametrize("path", [results.RECORDS / f"{name}.json" for name in STUDIES], ids=lambda path: path.stem)
def test_no_path_of_a_machine_is_published(path):
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ('"/', " /", "'/", "=/") if word in text]


def test_an_unknown_study_is_refused():
    with pytest.raises(ValueError, match=r"no study 'brains'; there are: .*brain"):
        results.run("brains", "data")
    with pytest.raises(ValueError, match="brain starts from pre-trained weights; give the file as --weights"):
        results.run("brain", "data")


def test_published_runs_say_where_data_lay_by_name_only(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    results.RECORDS.mkdir()
    (tmp_path / "docs").mkdir()
    found = results.Results.load(REPOSITORY / "benchmarks" / "results" / "quality" / "hippocampus.json")
    text = json.dumps({"plan": found.plan, "runs": found.records[:1], "trials": []})
    for name, path in (
        ("bundles/", "/home/me/bundles/"),
        ("data/", "/mnt/x y/"),
        (results.WEIGHTS, "/home/me/w.safetensors"),
    ):
        text = text.replace(name, path)
    work = tmp_path / "out" / "hippocampus"
    (work / "runs").mkdir(parents=True)
    (work / "results.json").write_text(text, encoding="utf-8")
    results.publish("hippocampus", str(tmp_path / "out"))
    for path in (tmp_path / "records" / "hippocampus.json", tmp_path / "docs" / "reports" / "hippocampus.html"):
        published = path.read_text(encoding="utf-8")
        assert "/home/me" not in published
        assert "/mnt/x y" not in published
        assert "data/mr_hippocampus" in published


def test_runs_of_the_record_are_put_back_as_this_machine_would_have_made_them(tmp_path):
    ids = {"dataset_dir": "/here/data/mr_brain_slab", "pretrained_path": "/here/w.safetensors"}
    results._restore("brain", tmp_path, ids)
    study, files = STUDIES["brain"], sorted((tmp_path / "runs").glob("*.json"))
    assert len(files) == len(study.methods) * len(study.shots) * study.seeds
    plan = Plan("bundle", study.methods, study.shots, study.seeds, settings={**study.settings, **ids})
    for job in plan.jobs():
        found = read_record(tmp_path / "runs" / f"{job.key}.json")
        wanted = {**plan.ids_of(job.method), "num_labelled": job.shots, "seed": job.seed}
        assert found["ids"] == json.loads(json.dumps(wanted)), job.key


def test_runs_with_pictures_are_made_again_because_those_are_not_kept(tmp_path):
    assert STUDIES["hippocampus"].pictures
    results._restore("hippocampus", tmp_path, {"dataset_dir": "d", "pretrained_path": "p"})
    assert {read_record(path)["seed"] for path in (tmp_path / "runs").glob("*.json")} == {1, 2}


def test_a_method_on_stored_features_has_its_folder_in_the_study(tmp_path):
    found = results.arms(STUDIES["busi_large"], tmp_path)
    assert found["fpt_plus"]["cache_dir"] == str(tmp_path / "features" / "fpt_plus")
    assert "cache_dir" not in found["side"]
    assert found["lora"]["bundle"] == str(REPOSITORY / "bundles" / "lora_vit_classification")
