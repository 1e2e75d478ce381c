"""DoRA is LoRA with lengths of rows: the same numbers as ``LoRA(dora=True)``, under a name of its own in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

import monai_petl as mp
from monai_petl.methods import DoRA, LoRA, export_peft, import_peft


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet(2, 1, 3, (4, 8), (2,), num_res_units=1).eval()


def trained(method: mp.Method) -> nn.Module:
    network = mp.adapt(unet(), method)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in mp.trainable_parameters(network):
            tensor.normal_(0, 0.3)
    return network


def test_it_computes_what_lora_with_the_flag_computes() -> None:
    image = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(trained(DoRA(rank=1))(image), trained(LoRA(rank=1, dora=True))(image), rtol=0, atol=0)


def test_it_starts_as_the_backbone() -> None:
    image = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(mp.adapt(unet(), DoRA(rank=1)).eval()(image), unet()(image), rtol=0, atol=1e-6)


def test_its_file_names_it_and_loads(tmp_path: Path) -> None:
    network, image = trained(DoRA(rank=1)), torch.rand(1, 1, 16, 16)
    mp.save_adapter(network, tmp_path / "a.safetensors")
    assert mp.inspect_adapter(tmp_path / "a.safetensors")["methods"][0]["method"] == "DoRA"
    torch.testing.assert_close(
        mp.load_adapter(unet(), tmp_path / "a.safetensors")(image), network(image), rtol=0, atol=0
    )


def test_it_goes_to_peft_and_back(tmp_path: Path) -> None:
    network, image = trained(DoRA(rank=1, exclude=["model.2.0*"])), torch.rand(1, 1, 16, 16)
    export_peft(network, tmp_path / "peft")
    torch.testing.assert_close(import_peft(unet(), tmp_path / "peft")(image), network(image))


def test_without_lengths_it_is_lora() -> None:
    with pytest.raises(ValueError, match="use LoRA"):
        DoRA(dora=False)
