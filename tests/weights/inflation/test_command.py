"""``python -m monai_petl inflate``: the file it writes, what it prints, how it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from safetensors import safe_open
from safetensors.torch import save_file

from monai_petl.__main__ import main
from monai_petl.inflation import load_inflated, vit_from_pretrained
from tests.weights.inflation.sources import resnet, timm_swin, timm_vit

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``python -m monai_petl inflate`` with arguments; returns what it prints."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["monai_petl", "inflate", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return call


def test_inflate_never_writes_over_its_source(run: Run, tmp_path: Path) -> None:
    save_file(timm_vit(), tmp_path / "vit.safetensors")
    before = (tmp_path / "vit.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="is the source itself, which would be lost"):
        run(tmp_path / "vit.safetensors", tmp_path / "vit.safetensors", "--network", "vit", "--img_size", "16,16,5")
    assert (tmp_path / "vit.safetensors").read_bytes() == before


def test_inflate_writes_a_network_and_prints_the_report(run: Run, tmp_path: Path) -> None:
    save_file(timm_vit(), tmp_path / "vit.safetensors")
    out = tmp_path / "made" / "vit3d.safetensors"
    arguments = ("--network", "vit", "--img_size", "16,16,5", "--in_channels", 1, "--num_heads", 4, "--mode", "average")
    text = run(tmp_path / "vit.safetensors", out, *arguments)
    for part in ("kernel 5 deep, average", "folded", "timm_vit checkpoint", f"written to {out}"):
        assert part in text
    network = ViT(1, (16, 16, 5), (4, 4, 5), 24, 96, 2, 4, classification=True, qkv_bias=True)
    expected = vit_from_pretrained(
        tmp_path / "vit.safetensors",
        spatial_dims=3,
        img_size=(16, 16, 5),
        in_channels=1,
        num_heads=4,
        mode="average",
    )
    load_inflated(network, out)
    wanted = {n: t for n, t in expected.state_dict().items() if not n.startswith("classification_head")}
    assert all(torch.equal(network.state_dict()[n], t) for n, t in wanted.items())
    with safe_open(out, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["notes"])["mode"] == "average"
    assert set(json.loads(header["versions"])) >= {"monai", "torch"}


def test_inflate_makes_swin_and_resnet_files(run: Run, tmp_path: Path) -> None:
    torch.save(timm_swin(), tmp_path / "swin.pt")
    out = tmp_path / "swin3d.safetensors"
    run(
        tmp_path / "swin.pt", out, "--network=swin", "--img_size=96,96,32", "--downsample=mergingv2", "--window_depth=1"
    )
    sizes = (3, 12, (3, 3, 1), (4, 4, 4), (2, 2, 2, 2), (2, 2, 4, 4))
    load_inflated(SwinTransformer(*sizes, patch_norm=True, downsample="mergingv2"), out)
    with pytest.raises(ValueError, match="made for downsample='mergingv2'"):
        load_inflated(SwinTransformer(*sizes, patch_norm=True), out)
    torch.save(resnet(), tmp_path / "resnet.pth")
    text = run(tmp_path / "resnet.pth", tmp_path / "resnet3d.safetensors", "--network=resnet", "--in_channels=1")
    assert "conv1.weight" in text


def test_inflate_ends_with_one_sentence_and_without_a_file(run: Run, tmp_path: Path) -> None:
    save_file(timm_vit(), tmp_path / "vit.safetensors")
    for wrong, sentence in (
        (("--network=unet",), "network must be vit, swin or resnet, got 'unet'"),
        (("--network=vit",), "img_size is needed for a vit"),
        (("--network=vit", "--img_size=17,16,5", "--num_heads=4"), "is no multiple of patch_size (4, 4, 5)"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "vit.safetensors", tmp_path / "out.safetensors", *wrong)
        assert isinstance(stop.value.code, str)
        assert stop.value.code.startswith("error: ")
        assert sentence in stop.value.code
        assert "\n" not in stop.value.code
    assert not (tmp_path / "out.safetensors").exists()
