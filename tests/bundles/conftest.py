"""A tiny data set and a tiny pre-trained network, made once for all bundle tests. Tests write elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from monai_petl.data import make_phantom_dataset
from tests.bundles.helpers import SIZE, SPACING, Trained, copy_bundle, run


@pytest.fixture(autouse=True)
def duplicates_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that stands twice in a JSON file is an error, in place of MONAI's warning."""
    monkeypatch.setenv("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms to train on, one for validation, two for test."""
    return make_phantom_dataset(tmp_path_factory.mktemp("phantoms") / "data", 4, 1, 2, 0, SIZE, SPACING)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Trained:
    """The bundle after pre-training on the base classes."""
    bundle = copy_bundle(tmp_path_factory.mktemp("pretrained"))
    return Trained(bundle, run("pretrain", bundle, data))


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory, data: Path, pretrained: Trained) -> Trained:
    """The bundle after prompt tuning of the kidney."""
    bundle = copy_bundle(tmp_path_factory.mktemp("tuned"))
    return Trained(bundle, run("train", bundle, data, pretrained_path=str(pretrained.model)))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A fresh copy of the bundle."""
    return copy_bundle(tmp_path)
