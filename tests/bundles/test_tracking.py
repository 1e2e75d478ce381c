"""Training is tracked without a change to a bundle: TensorBoard always, MLflow by ``--tracking mlflow``."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from monai.bundle import ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.bundles.helpers import BUNDLES, CLASSIFIER, INFLATED, SIDE_ADAPTER, Bundle, Trained, named, parsed


@pytest.mark.parametrize("bundle", BUNDLES, ids=named)
def test_training_writes_loss_and_metric_for_tensorboard(bundle: Bundle, train_once) -> None:
    trained: Trained = train_once(bundle)
    found: dict[str, int] = {}
    for path in (trained.bundle / "eval" / "tensorboard").iterdir():
        events = EventAccumulator(str(path)).Reload()
        found |= {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    assert found["train_loss"] == 4
    assert found[key_metric(trained.workflow)] == 2


def key_metric(flow: ConfigWorkflow) -> str:
    return parsed(flow, "validate::evaluator").state.key_metric_name


@pytest.mark.parametrize("bundle", [INFLATED, SIDE_ADAPTER, CLASSIFIER], ids=named)
def test_mlflow_is_told_of_loss_metric_and_config(
    bundle: Bundle, tmp_path: Path, data_of, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs MLflow")
    monkeypatch.chdir(tmp_path)
    root = bundle.copy(tmp_path / "bundle")
    settings = {**bundle.settings["train"], "bundle_root": str(root), "dataset_dir": str(data_of(bundle))}
    settings["pretrained_path"] = str(request.getfixturevalue(bundle.source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flow = ConfigWorkflow(
            bundle.config_files(root, "train"),
            logging_file=False,
            workflow_type="train",
            tracking="mlflow",
            **settings,
        )
        flow.initialize()
        flow.run()
        flow.finalize()
        (store,) = (root / "eval").rglob("*.db")
        client = mlflow.tracking.MlflowClient(f"sqlite:///{store}")
        runs = [run for found in client.search_experiments() for run in client.search_runs([found.experiment_id])]
    metrics = {name for run in runs for name in run.data.metrics}
    assert key_metric(flow) in metrics
    assert any("loss" in name for name in metrics)
    assert any(path.suffix == ".json" for path in (root / "eval").rglob("*"))
