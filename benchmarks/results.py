"""Quality on real data: runs the studies by ``compare`` and writes docs/results.md from what they measured.

    python benchmarks/results.py run brain --data PATH --weights dinov2_vits14.safetensors
    python benchmarks/results.py run all --data PATH --weights dinov2_vits14.safetensors
    python benchmarks/results.py page

``--missing`` runs what the repository has no record of, a method that is new for example, and nothing again. PATH holds the
data sets, a folder each. A study's work lies in ``results/STUDY``, where an interrupted one goes on. What it measured goes
to ``benchmarks/results/quality/STUDY.json``, without the paths of this machine, and a report that may be shown to
``docs/reports``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import fire
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from monai.bundle import ConfigParser, ConfigWorkflow
from studies import STUDIES, Study

from monai_petl.compare import Results, compare, markdown_table, write_report
from monai_petl.compare.plan import Job
from monai_petl.compare.records import write_record

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "quality"
WEIGHTS = "dinov2_vits14.safetensors"
PATHS = ("dataset_dir", "pretrained_path", "cache_dir")  # ids that differ from machine to machine


def run(
    study: str,
    data: str,
    weights: str = "",
    out: str = "results",
    devices: str | None = None,
    missing: bool = False,
) -> None:
    """Run a study, or ``all`` of them, publish what was measured, and write the page."""
    for name in STUDIES if study == "all" else (study,):
        chosen, folder = _study(name), Path(out).resolve() / name
        ids: dict[str, Any] = {**chosen.settings, "dataset_dir": str(Path(data).resolve() / chosen.data)}
        if chosen.weights and not weights:
            raise ValueError(f"{name} starts from pre-trained weights; give the file as --weights (WEIGHTS= with make)")
        if chosen.weights:
            ids["pretrained_path"] = str(Path(weights).resolve())
        if chosen.pretraining:
            ids["pretrained_path"] = str(_pretrained(chosen, ids, Path(out).resolve() / "pretrained"))
        methods = folder / "methods.json"
        folder.mkdir(parents=True, exist_ok=True)
        methods.write_text(json.dumps(arms(chosen, folder), indent=4) + "\n", encoding="utf-8")
        if missing:
            _restore(name, folder, ids)
        _store_features(chosen, folder, ids)
        compare(
            str(ROOT / "bundles" / chosen.bundle),
            str(methods),
            out=str(folder),
            seeds=chosen.seeds,
            budget=chosen.budget,
            shots=["all" if shots is None else shots for shots in chosen.shots],
            section=chosen.section,
            devices=devices,
            pictures=chosen.pictures,
            **ids,
        )
        publish(name, out)
    page()


def arms(study: Study, folder: Path) -> dict[str, dict[str, Any]]:
    """The methods of a study, with paths of bundles, and of stored features in the study's folder."""
    homes = {"bundle": ROOT / "bundles", "cache_dir": folder}
    return {
        label: {name: str(homes[name] / value) if name in homes else value for name, value in ids.items()}
        for label, ids in study.methods.items()
    }


def publish(study: str, out: str = "results") -> None:
    """Keep what a finished study measured in the repository."""
    chosen, folder = _study(study), Path(out).resolve() / study
    found = Results.load(folder / "results.json")
    if any(record["status"] != "done" for record in found.records):
        raise ValueError(f"some runs of {study} failed; see {folder / 'report.html'}, and run it again")
    local = found.plan["settings"]
    names = {
        str(Path(found.plan["bundle"]).parent): "bundles",
        str(local["dataset_dir"]): f"data/{chosen.data}",
        str(local["pretrained_path"]): WEIGHTS if chosen.weights else "pretrained/model.pt",
        f"{folder}/": "",
    }
    told = [record for record in (*found.records, *found.trials) if "command" in record]  # the first records have none
    for record in told:  # a study may have been continued from another checkout
        words = shlex.split(record["command"])
        names[str(Path(words[words.index("--bundle_root") + 1]).parent)] = "bundles"
    text = json.dumps({"plan": found.plan, "records": found.records, "trials": found.trials})
    for path, name in names.items():
        text = text.replace(path, name)
    public = json.loads(text)
    for record in (*public["records"], *public["trials"]):
        if "command" in record:
            record["command"] = record["command"].split(" --ckpt_dir ")[0]  # the rest is where this machine wrote
    results = Results(public["plan"], public["records"], public["trials"])
    (RECORDS / f"{study}.json").write_text(_compact(results.to_dict()), encoding="utf-8")
    if chosen.report:
        command = f"python benchmarks/results.py run {study} --data data --weights {WEIGHTS}"
        path = write_report(results, folder, chosen.title, chosen.attribution, command)
        target = ROOT / "docs" / "reports" / f"{study}.html"
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")


def page() -> None:
    """Write docs/results.md from its template and what the studies measured."""
    (ROOT / "docs" / "results.md").write_text(rendered(), encoding="utf-8")


def rendered() -> str:
    """docs/results.md, as the records say."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "table": lambda name, *also: markdown_table(results(name), also=also),
        "score": score,
        "gap": lambda name, first, second, shots: f"{_mean(name, first, shots) - _mean(name, second, shots):.1f}",
        "ratio": ratio,
        "epoch": epoch,
        "advice": lambda name, shots: results(name).advice(shots)["text"],
        "choices": choices,
    }
    return environment.get_template("results.md.j2").render()


def results(study: str) -> Results:
    """What a study measured."""
    return Results.load(RECORDS / f"{study}.json")


def score(study: str, method: str, shots: int | None = None) -> str:
    """Mean and standard deviation over the seeds, in per cent."""
    found = _qualities(study, method, shots)
    return f"{_mean(study, method, shots):.1f}" + (f" ± {stdev(found):.1f}" if len(found) > 1 else "")


def ratio(study: str, first: str, second: str, cost: str) -> str:
    """A cost of one method in per cent of that of another."""
    costs = results(study).summary().groupby("method")[cost].mean()
    return f"{100 * costs[first] / costs[second]:.0f}"


def epoch(study: str, method: str, images: int) -> str:
    """Processor seconds of the steps that see as many images."""
    runs = [run for run in results(study).records if run["method"] == method]
    return f"{mean(run['step_seconds'] / run['ids']['batch_size'] for run in runs) * images:.0f}"


def choices(name: str) -> str:
    """What was measured to choose a default, as a table."""
    found = json.loads((RECORDS / "choices.json").read_text(encoding="utf-8"))[name]
    ruler = " | ".join(["---", *["---:"] * (len(found["columns"]) - 1)])
    rows = [found["columns"], *(["not run" if cell is None else str(cell) for cell in row] for row in found["rows"])]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| {ruler} |", *lines[1:]])


def _qualities(study: str, method: str, shots: int | None) -> list[float]:
    runs = results(study).records
    return [100 * run["quality"] for run in runs if (run["method"], run["shots"]) == (method, shots)]


def _mean(study: str, method: str, shots: int | None) -> float:
    return mean(_qualities(study, method, shots))


def _study(name: str) -> Study:
    if name not in STUDIES:
        raise ValueError(f"no study {name!r}; there are: {', '.join(STUDIES)}")
    return STUDIES[name]


def _restore(name: str, folder: Path, ids: Mapping[str, Any]) -> None:
    """Put back what the repository knows of a study's runs, so that they are not made again."""
    if not (RECORDS / f"{name}.json").is_file():
        return
    study = _study(name)
    wanted = arms(study, folder)
    for record in results(name).records:
        if record["method"] not in wanted or (study.pictures and record["seed"] == 0):  # whose pictures are not kept
            continue
        job = Job(record["phase"], record["method"], record["shots"], record["seed"], record["factor"])
        path = folder / "runs" / f"{job.key}.json"
        if path.exists():
            continue
        here = {**ids, **wanted[job.method]}
        local = {key: here[key] for key in PATHS if key in here and key in record["ids"]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, {**record, "ids": {**record["ids"], **local}})


def _store_features(study: Study, folder: Path, ids: Mapping[str, Any]) -> None:
    """What the frozen transformers of a study's methods say of all images, for methods that train on that."""
    for own in arms(study, folder).values():
        if "cache_dir" in own:
            root = Path(own.get("bundle", ROOT / "bundles" / study.bundle))
            _run_bundle(root, ["train", "preload"], {**ids, **own, "num_labelled": None})


def _pretrained(study: Study, ids: dict[str, Any], folder: Path) -> Path:
    """The network that the bundle's pretrain.json makes, made once for all studies of the data."""
    root = ROOT / "bundles" / study.bundle
    models = folder / study.data
    if not (models / "model.pt").is_file():
        where = {"ckpt_dir": str(models), "output_dir": str(models / "eval")}
        _run_bundle(root, ["pretrain"], {**ids, **study.pretraining, **where})
    return models / "model.pt"


def _run_bundle(root: Path, configs: Sequence[str], ids: Mapping[str, Any]) -> None:
    """Run configs of a bundle, merged, with those of the ids that they know."""
    files = [str(root / "configs" / f"{config}.json") for config in configs]
    known = ConfigParser.load_config_files(files)
    workflow = ConfigWorkflow(
        config_file=files,
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(root),
        **{name: value for name, value in ids.items() if name in known},
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def _compact(record: dict[str, Any]) -> str:
    """JSON with a line a run."""
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    runs = ",\n".join(json.dumps(run) for run in finite.pop("runs"))
    return json.dumps(finite, indent=1)[:-2] + f',\n "runs": [\n{runs}\n ]\n}}\n'


if __name__ == "__main__":
    fire.Fire({"run": run, "publish": publish, "page": page})
