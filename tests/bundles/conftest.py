"""A tiny data set and a tiny pre-trained network, made once for all bundle tests. Tests write elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from monai_petl.data import make_phantom_dataset
from tests.bundles.helpers import (
    BUNDLES,
    CLASSIFIERS,
    INFLATED,
    PUNET,
    SIZE,
    SPACING,
    Bundle,
    Trained,
    checkpoint_state,
    copy_bundle,
    run,
    swin_state,
)


@pytest.fixture(autouse=True)
def duplicates_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that stands twice in a JSON file is an error, in place of MONAI's warning."""
    monkeypatch.setenv("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms to train on, one for validation, two for test."""
    return make_phantom_dataset(tmp_path_factory.mktemp("phantoms") / "data", 4, 1, 2, 0, SIZE, SPACING)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three classes in folders: dark, bright, and bright on one side; one is grey, one has transparency."""
    root, random = tmp_path_factory.mktemp("images") / "data", np.random.default_rng(0)
    for section, count in {"training": 4, "validation": 2, "test": 2}.items():
        for name in ("normal", "benign", "malignant"):
            (root / section / name).mkdir(parents=True)
            for i in range(count):
                picture = random.integers(0, 60, (40, 48, 4), np.uint8)
                picture[:, slice(0, {"normal": 0, "benign": 24, "malignant": 48}[name])] += 150
                mode = "L" if i == 0 else "RGBA" if i == 1 else "RGB"
                Image.fromarray(picture).convert(mode).save(root / section / name / f"{name}_{i}.png")
    return root


@pytest.fixture(scope="session")
def data_of(data: Path, images: Path) -> Callable[[Bundle], Path]:
    """The data set that a bundle is for."""
    return lambda bundle: images if bundle in CLASSIFIERS else data


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Trained:
    """The bundle after pre-training on the base classes."""
    bundle = copy_bundle(tmp_path_factory.mktemp("pretrained"))
    return Trained(bundle, run("pretrain", bundle, data))


@pytest.fixture(scope="session")
def tuned(train_once: Callable[[Bundle], Trained]) -> Trained:
    """The bundle after prompt tuning of the kidney."""
    return train_once(PUNET)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2D vision transformer with random weights, as a file of timm."""
    path = tmp_path_factory.mktemp("checkpoint") / "vit.safetensors"
    save_file(checkpoint_state(), path)
    return path


@pytest.fixture(scope="session")
def swin_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SwinUNETR with random weights."""
    path = tmp_path_factory.mktemp("swin") / "swin.pt"
    torch.save(swin_state(), path)
    return path


@pytest.fixture(scope="session")
def pretrained_punet(pretrained: Trained) -> Path:
    """The network of the pre-training."""
    return pretrained.model


@pytest.fixture(scope="session")
def train_once(
    tmp_path_factory: pytest.TempPathFactory, data_of: Callable[[Bundle], Path], request: pytest.FixtureRequest
) -> Callable[[Bundle], Trained]:
    """Trains a bundle from its source; the second time it gives what the first has made."""

    made: dict[str, Trained] = {}

    def make(bundle: Bundle) -> Trained:
        if bundle.name not in made:
            copy = bundle.copy(tmp_path_factory.mktemp("trained"))
            source = request.getfixturevalue(bundle.source)
            made[bundle.name] = Trained(copy, bundle.run("train", copy, data_of(bundle), pretrained_path=str(source)))
        return made[bundle.name]

    return make


@pytest.fixture(scope="session")
def inflated(train_once: Callable[[Bundle], Trained]) -> Trained:
    """The bundle of inflated transformers after training a decoder on the frozen backbone."""
    return train_once(INFLATED)


@pytest.fixture(params=BUNDLES, ids=lambda bundle: bundle.name)
def each(request: pytest.FixtureRequest) -> Bundle:
    """Every bundle in turn."""
    return request.param


@pytest.fixture
def trained(each: Bundle, train_once: Callable[[Bundle], Trained]) -> Trained:
    """The bundle in turn, trained."""
    return train_once(each)


@pytest.fixture
def weights(each: Bundle, trained: Trained, request: pytest.FixtureRequest) -> dict[str, str]:
    """Where the weights are that the bundle in turn reads, as overrides of any config."""
    return {"pretrained_path": str(request.getfixturevalue(each.source)), "ckpt_path": str(trained.model)}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A fresh copy of the bundle."""
    return copy_bundle(tmp_path)
