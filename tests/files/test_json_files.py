"""A JSON file that is damaged is refused in a sentence with its name, whatever is in it; no other error leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from monai_petl.bundle.folder import BundleFolder
from monai_petl.compare import Plan, Results
from monai_petl.compare.plan import parse_methods
from monai_petl.compare.records import read_record
from monai_petl.data import FeatureCache
from monai_petl.files.json_files import read_object, require_fields
from monai_petl.methods.parts.peft_files import _read_config

PLAN = Plan("bundle", {"lora": {"method": "lora"}}, seeds=1)
RUN = {"phase": "test", "method": "lora", "shots": None, "seed": 0, "factor": 1.0, "ids": {}, "section": "test"}
DONE = {"status": "done", "quality": 0.5, "metric": "dice", "cases": {"a": 0.5}, "steps": 2, "versions": {}, "date": ""}
RECORD = {**RUN, **DONE, "run_seconds": 1.0}
CACHE = {"weights": "abc", "dtype": "float16"}
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"q": 2}}

READERS: dict[str, tuple[object, Callable[[Path], object]]] = {
    "record.json": (RECORD, read_record),
    "plan.json": (PLAN.to_dict(), lambda file: PLAN.save(file.parent)),
    "results.json": ({"plan": PLAN.to_dict(), "runs": [RECORD], "trials": []}, Results.load),
    "methods.json": ({"LoRA 4": {"method": "lora", "rank": 4}}, lambda file: parse_methods(str(file))),
    "cache.json": (CACHE, lambda file: FeatureCache(file.parent, {"weights": "abc"})),
    "adapter_config.json": (PEFT, _read_config),
}
WRONG = {
    "nothing": b"",
    "text": b"method: lora",
    "no text": b"\xff\xfe\x00\x80",
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "too deep": b"[" * 100_000,
    "tables too deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a name twice": b'{"method": 1, "method": 2}',
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_table_is_refused_by_name(tmp_path, name, wrong):
    file = tmp_path / name
    file.write_bytes(WRONG[wrong])
    with pytest.raises(ValueError, match=rf"{file} is damaged: .+\. [A-Z].+") as error:
        READERS[name][1](file)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", READERS)
def test_mutations_are_read_or_refused_by_name(tmp_path, name):
    """Values that are gone or of another kind, and bytes that are changed, 300 times."""
    contents, read = READERS[name]
    random, file = np.random.default_rng(0), tmp_path / name
    text = json.dumps(contents).encode()
    file.write_bytes(text)
    read(file)
    for _ in range(300):
        data = bytearray(text)
        place = int(random.integers(len(data)))
        if random.integers(2):
            data[place] = int(random.integers(32, 127))
        else:
            data[place : place + int(random.integers(1, 30))] = random.choice(
                [b"", b"null", b"7", b'"x"', b"[]", b"{}"]
            )
        file.write_bytes(data)
        try:
            read(file)
        except ValueError as error:
            assert str(tmp_path) in str(error) or "methods of different tasks" in str(error), data  # noqa: PT017


@pytest.mark.parametrize("key", RECORD)
@pytest.mark.parametrize("value", [[], "x", True, {"a": "b"}])
def test_values_of_another_kind_in_a_record_are_named(tmp_path, key, value):
    file = tmp_path / "record.json"
    file.write_text(json.dumps({**RECORD, key: value}), encoding="utf-8")
    if key == "phase" or (isinstance(value, type(RECORD[key])) and key != "cases"):
        return
    with pytest.raises(ValueError, match=f"record.json is damaged: .*{key}.*made again"):
        read_record(file)


def test_a_method_that_is_no_table_is_named(tmp_path):
    (tmp_path / "m.json").write_text('{"lora": 4}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"m\.json is damaged: 'lora' must be a table, got a whole number.*LoRA 4"):
        parse_methods(str(tmp_path / "m.json"))
    (tmp_path / "m.json").write_text('{"lora": {"bundle": 4}}', encoding="utf-8")
    with pytest.raises(ValueError, match="'bundle' of 'lora' must be the folder of a bundle, got 4"):
        parse_methods(str(tmp_path / "m.json"))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.json"):
        parse_methods(str(tmp_path / "none.json"))


def test_a_config_of_a_bundle_that_is_no_table_is_named(tmp_path):
    (tmp_path / "configs").mkdir()
    for name, text in (("metadata", "{}"), ("train", "[" * 100_000)):
        (tmp_path / "configs" / f"{name}.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.json is damaged: it is nested too deeply"):
        BundleFolder(tmp_path).config("train")


def test_numbers_are_not_truth_values():
    path = Path("a.json")
    require_fields(path, {"a": 1}, {"a": (int,)}, "")
    with pytest.raises(ValueError, match=r"a\.json is damaged: 'a' must be a whole number"):
        require_fields(path, {"a": True}, {"a": (int,)}, "")


def test_the_error_has_the_class_that_is_asked_for(tmp_path):
    class OwnError(ValueError):
        pass

    (tmp_path / "a.json").touch()
    with pytest.raises(OwnError, match=r"a\.json is damaged: .*\. Copy it again"):
        read_object(tmp_path / "a.json", "Copy it again", OwnError)
