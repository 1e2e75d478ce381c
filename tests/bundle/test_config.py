from __future__ import annotations

import json
from pathlib import Path

import pytest

from monai_petl.bundle import network_of_config
from monai_petl.core.records import adapters_of
from monai_petl.networks import PUNet

BUNDLE = Path(__file__).parents[2] / "bundles" / "punet_ct_segmentation"
SMALL = {"channels": [8, 8, 16], "tokens_per_class": 4}


def test_bundle_folder_stands_for_its_training_config() -> None:
    network = network_of_config(BUNDLE, **SMALL, new_class="spine")
    assert isinstance(network, PUNet)
    assert list(adapters_of(network)) == ["spine"]
    assert network.active_classes == ["spine"]


def test_config_without_adaptation_gives_its_plain_network() -> None:
    network = network_of_config(BUNDLE / "configs" / "inference.json", **SMALL, class_names=["liver"])
    assert network.classes == ["liver"]
    assert not adapters_of(network)
    assert network_of_config(BUNDLE / "configs" / "pretrain.json", **SMALL).classes == ["liver", "spleen", "aorta"]


def test_no_weights_and_no_data_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network_of_config(BUNDLE, **SMALL)
    assert not list(tmp_path.iterdir())


def test_errors_name_the_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config at .*none"):
        network_of_config(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"configs/train\.json"):
        network_of_config(tmp_path)
    with pytest.raises(ValueError, match=r"has no id 'channel'; its ids are: imports, .*channels"):
        network_of_config(BUNDLE, channel=3)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"lr": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="describes no network; one of the ids adapted_network, network, network_def"):
        network_of_config(config)
