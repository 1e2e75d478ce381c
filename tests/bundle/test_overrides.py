"""The command line of a bundle names ids that exist, and gives values of their kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from monai_petl.bundle import check_overrides

CONFIG = {
    "epochs": 3,
    "lr": 0.1,
    "amp": True,
    "class_names": ["liver", "spleen"],
    "spacing": [1.5, 1.5, 2.0],
    "num_labelled": None,
    "dataset_dir": "$@bundle_root + '/data'",
    "train": {"trainer": {"max_epochs": 3}, "handlers": [{"interval": 1}]},
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--train::trainr::max_epochs 3", "did you mean train::trainer"),
        ("--epoch 3", "the config has no id 'epoch', which --epoch would set; did you mean epochs?"),
        ("--zzz=1", "no id 'zzz', which --zzz would set; the ids are: amp, class_names"),
        ("--trian::trainer::max_epochs 3", "did you mean train?"),
        ("--lr abc", "--lr must be a number; got 'abc'"),
        ("--epochs 1.5", "--epochs must be a whole number; got 1.5"),
        ("--epochs many", "--epochs must be a whole number; got 'many'"),
        ("--train::trainer::max_epochs x", "--train::trainer::max_epochs must be a whole number; got 'x'"),
        ("--train#handlers#0#interval x", "must be a whole number"),
        ("--amp yes", "--amp must be True or False; got 'yes'"),
        ("--class_names liver", "--class_names must be a list of names, such as \"['liver']\"; got 'liver'"),
        ("--spacing coarse", "--spacing must be numbers, such as [1.5, 1.5, 2.0]; got 'coarse'"),
    ],
)
def test_a_wrong_id_or_value_is_refused_with_its_name(config: str, words: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        check_overrides(["--config_file", config, *words.split()])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        "--epochs 4 --lr 1 --amp False --amp",
        "--class_names ['kidney'] --spacing [1,1,1] --spacing 2",
        "--num_labelled 3 --num_labelled abc --dataset_dir 5",
        "--epochs $2+2 --lr @epochs --class_names $['a']",
        "--tracking mlflow --tracking_uri file:/x --experiment_name mine",
        "--+extra 1 --run_id run --meta_file none --train::handlers []",
    ],
)
def test_ids_of_the_config_take_values_of_their_kind(config: str, words: str) -> None:
    check_overrides(["--config_file", f"['{config}']", *words.split()])


def test_several_configs_count_together(config: str, tmp_path: Path) -> None:
    (tmp_path / "evaluate.json").write_text('{"eval_section": "test"}', encoding="utf-8")
    files = f"['{config}','{tmp_path}/evaluate.json']"
    check_overrides(["--config_file", files, "--eval_section", "validation", "--epochs", "3"])
    with pytest.raises(ValueError, match="did you mean eval_section"):
        check_overrides(["--config_file", files, "--eval_sectoin", "validation"])


def test_another_program_has_nothing_to_check() -> None:
    check_overrides()
