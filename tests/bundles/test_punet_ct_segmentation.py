"""The bundle of PUNet as it lies in the repository: what it has beyond every bundle."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser

from tests.bundles.helpers import BUNDLE, PUNET, Trained, parsed, state_in


@pytest.mark.parametrize("file", ["configs/pretrain.json", "configs/multi_gpu_pretrain.json"])
def test_bundle_has_the_files_of_pretraining(file: str) -> None:
    assert (BUNDLE / file).is_file()


def test_default_network_has_the_documented_size_and_keeps_the_size_of_the_image() -> None:
    network = ConfigParser(PUNET.config("inference")).get_parsed_content("network_def").eval()
    assert sum(p.numel() for p in network.body.parameters()) == 6_758_304
    assert sum(p.numel() for p in network.prompts["kidney"].parameters()) == 57_344
    with torch.no_grad():
        out = network(torch.rand(1, 1, 48, 32, 1))
    assert out.shape == (1, 5, 48, 32, 1)


def test_model_file_is_a_flat_state_dict_of_all_classes(pretrained: Trained, tuned: Trained) -> None:
    for trained in (pretrained, tuned):
        state = state_in(trained.model)
        network = parsed(trained.workflow, "network_def")
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        assert list(state) == list(network.state_dict())
    assert parsed(pretrained.workflow, "network_def").classes == ["liver", "spleen"]
    assert parsed(tuned.workflow, "network_def").classes == ["liver", "spleen", "kidney"]
