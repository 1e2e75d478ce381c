"""Running a plan: every run once, on all devices, through failures and interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from monai_petl.compare import Plan, Results, Schedule, find_devices
from monai_petl.compare.records import write_record

WORKER = "tests.compare.fake_worker"


def plan(folder: Path, *methods: str, **options) -> Plan:
    settings = {"diary": str(folder / "diary.txt"), "gate": str(folder / "gate")}
    return Plan("bundle", {name: {"method": name} for name in methods}, settings=settings, **options)


def run(chosen: Plan, folder: Path, devices: tuple[str, ...] = ("cpu",)) -> Schedule:
    schedule = Schedule(chosen, folder, devices, WORKER)
    schedule.records = schedule.run()  # type: ignore[attr-defined]
    return schedule


def diary(folder: Path) -> list[str]:
    return (folder / "diary.txt").read_text(encoding="utf-8").splitlines()


def test_every_run_is_made_once(tmp_path):
    chosen = plan(tmp_path, "good", "cheap", shots=(3, None), seeds=2)
    first = run(chosen, tmp_path)
    assert sorted(line.split()[0] for line in diary(tmp_path)) == sorted(job.key for job in chosen.jobs())
    again = run(chosen, tmp_path)
    assert len(diary(tmp_path)) == 8
    assert first.records == again.records
    assert not any((tmp_path / "work").iterdir())


def test_a_wider_plan_adds_what_is_missing(tmp_path):
    run(plan(tmp_path, "good", seeds=1), tmp_path)
    run(plan(tmp_path, "good", "cheap", seeds=2), tmp_path)
    assert len(diary(tmp_path)) == 4


def test_what_was_made_with_other_settings_is_made_again(tmp_path):
    run(plan(tmp_path, "good", seeds=1), tmp_path)
    changed = Plan(**{**plan(tmp_path, "good", seeds=1).to_dict(), "methods": {"good": {"method": "good", "rank": 16}}})
    records = run(changed, tmp_path).records
    assert records[0]["ids"]["rank"] == 16
    assert len(diary(tmp_path)) == 2
    run(Plan(**{**changed.to_dict(), "section": "validation"}), tmp_path)
    assert len(diary(tmp_path)) == 3


def test_a_second_comparison_in_the_same_folder_is_refused(tmp_path):
    process = in_background(plan(tmp_path, "slow", seeds=1), tmp_path, "cpu")
    try:
        wait_for((tmp_path / "diary.txt").exists)
        with pytest.raises(ValueError, match="another comparison is running in"):
            run(plan(tmp_path, "good", seeds=1), tmp_path)
        (tmp_path / "gate").touch()
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_other_rates_are_other_runs(tmp_path):
    run(plan(tmp_path, "cheap", seeds=1), tmp_path)
    records = run(plan(tmp_path, "cheap", seeds=1, trials=2), tmp_path).records
    assert records[0]["factor"] == 0.3
    assert {"test_cheap_all_seed0.json", "test_cheap_all_seed0_x0.3.json"} <= {
        path.name for path in (tmp_path / "runs").iterdir()
    }


def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path):
    records = run(plan(tmp_path, "breaks", "good", "dies", seeds=1), tmp_path).records
    found = {record["method"]: record for record in records}
    assert found["good"]["status"] == "done"
    assert found["breaks"]["status"] == found["dies"]["status"] == "failed"
    assert found["breaks"]["error"] == "ValueError: this method cannot"
    assert "signal 9; out of memory" in found["dies"]["error"]
    assert "this method cannot" in (tmp_path / "runs" / "test_breaks_all_seed0.log").read_text(encoding="utf-8")


def test_what_failed_is_tried_again(tmp_path):
    run(plan(tmp_path, "breaks", "good", seeds=1), tmp_path)
    run(plan(tmp_path, "breaks", "good", seeds=1), tmp_path)
    assert [line.split()[0] for line in diary(tmp_path)].count("test_breaks_all_seed0") == 2
    assert [line.split()[0] for line in diary(tmp_path)].count("test_good_all_seed0") == 1


def test_all_devices_work_at_once(tmp_path):
    """The slow run holds one of the two until everything else is done."""
    chosen = plan(tmp_path, "slow", "good", "cheap", seeds=1)
    process = in_background(chosen, tmp_path, "cpu,cpu")
    try:
        wait_for(lambda: len(list((tmp_path / "runs").glob("*.json"))) == 2)
        assert not (tmp_path / "runs" / "test_slow_all_seed0.json").exists()
        (tmp_path / "gate").touch()
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3


def test_an_interrupted_comparison_goes_on_to_the_same_table(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    (whole / "gate").touch()
    expected = run(plan(whole, "good", "slow", "cheap", seeds=2), whole)
    chosen = plan(broken, "good", "slow", "cheap", seeds=2)
    process = in_background(chosen, broken, "cpu")
    try:
        wait_for(lambda: len(diary(broken)) == 2 if (broken / "diary.txt").exists() else False)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert [path.stem for path in (broken / "runs").glob("*.json")] == ["test_good_all_seed0"]
    (broken / "gate").touch()
    resumed = run(chosen, broken)
    assert sorted(line.split()[0] for line in diary(broken)).count("test_good_all_seed0") == 1
    tables = [Results(s.plan.to_dict(), s.records).runs() for s in (expected, resumed)]
    pd.testing.assert_frame_equal(*tables)


def in_background(chosen: Plan, folder: Path, devices: str) -> subprocess.Popen:
    """The schedule in a process of its own, which can be interrupted also where this one was started to ignore that."""
    code = (
        "import json, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pathlib import Path; from monai_petl.compare import Plan, Schedule; "
        "Schedule(Plan(**json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3].split(','), sys.argv[4]).run()"
    )
    arguments = [json.dumps(chosen.to_dict()), str(folder), devices, WORKER]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_better_rate_is_taken_for_each_method(tmp_path):
    schedule = run(plan(tmp_path, "good", "cheap", seeds=1, trials=3), tmp_path)
    assert {record["method"]: record["factor"] for record in schedule.records} == {"good": 1.0, "cheap": 0.3}
    assert len(schedule.trials()) == 6
    assert len(diary(tmp_path)) == 8


def test_the_search_ends_with_its_time(tmp_path):
    """A run takes two seconds here, so the third trial would end after the fifth second."""
    schedule = run(plan(tmp_path, "good", "cheap", seeds=1, trials=5, seconds=5.0), tmp_path)
    assert [record["factor"] for record in schedule.trials()] == [1.0, 0.3] * 2
    again = run(plan(tmp_path, "good", "cheap", seeds=1, trials=5, seconds=5.0), tmp_path)
    assert again.records == schedule.records
    assert len(diary(tmp_path)) == 6


def test_a_search_that_fails_leaves_the_rates_of_the_bundle(tmp_path):
    schedule = run(plan(tmp_path, "breaks", seeds=1, trials=2), tmp_path)
    assert [record["factor"] for record in schedule.records] == [1.0]
    assert len(schedule.trials()) == 2


def test_devices(monkeypatch, tmp_path):
    assert find_devices("cpu,cpu") == ["cpu", "cpu"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert find_devices() == ["cpu"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert find_devices() == ["cuda:0", "cuda:1"]
    with pytest.raises(ValueError, match=r"no cuda:7 here; there is cpu, cuda:0, cuda:1"):
        find_devices("cuda:1,cuda:7")
    with pytest.raises(ValueError, match="costs on cuda:1, cpu cannot be compared; give GPUs only, or CPUs only"):
        find_devices("cuda:1,cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    run(plan(tmp_path, "good", seeds=1), tmp_path, ("cuda:1",))
    assert diary(tmp_path) == ["test_good_all_seed0 6"]
    run(plan(tmp_path, "cheap", seeds=1), tmp_path, ("cpu",))
    assert diary(tmp_path)[-1] == "test_cheap_all_seed0 cpu"


def test_a_record_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, {"a": 1})
    with pytest.raises(TypeError):
        write_record(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}


def test_a_record_that_is_damaged_is_named_and_its_run_made_again(tmp_path, caplog):
    chosen = plan(tmp_path, "good", "cheap", seeds=1)
    first = run(chosen, tmp_path)
    first.path(chosen.jobs()[0]).write_text('{"status": "done"}', encoding="utf-8")
    first.path(chosen.jobs()[1]).write_bytes(b"half")
    again = run(chosen, tmp_path)
    assert again.records == first.records
    assert len(diary(tmp_path)) == 4
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(Path(text.split(" is damaged")[0]).stem for text in said) == sorted(j.key for j in chosen.jobs())
