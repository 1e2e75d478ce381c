"""Published layouts load whole, every tensor is accounted for, and the network computes what the official class computed."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import monai_petl as mp
from monai_petl.bundle import BundleFolder
from monai_petl.weights import Family, published
from tests.conftest import Run, error_of
from tests.weights.layouts import Layout, layouts

FAMILIES = ("swinunetr", "segresnet", "vista3d", "resnet3d")
LAYOUTS = [layout for family in FAMILIES for layout in layouts(family)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


def asked(layout: Layout) -> dict[str, Any]:
    """Arguments that the file does not tell."""
    if layout.family == "swinunetr" or (
        layout.family == "segresnet" and "Encoder" not in layout.case["network"]["class"]
    ):
        return {"out_channels": layout.arguments["out_channels"]}
    return {"last_supported": 6} if layout.family == "vista3d" else {}


def merlin(layout: Layout) -> bool:
    return layout.name.startswith("merlin")


def outputs(network: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Intermediate outputs under the names of the fixtures."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, list | tuple) else [output]
            for i, part in enumerate(parts):
                found.setdefault(f"{name}.{i}" if len(parts) > 1 else name, part)

        module.register_forward_hook(hook)

    x = layout.image()
    with torch.no_grad():
        if layout.family == "swinunetr":
            keep("hidden", network.swinViT)
            for i, name in enumerate(("encoder1", "encoder2", "encoder3", "encoder4", "encoder10")):
                keep(f"enc.{i}", getattr(network, name))
            keep("decoder1", network.decoder1)
            found["logits"] = network(x)
        elif hasattr(network, "down_layers"):
            for i, level in enumerate(network.down_layers):
                keep(f"encode.{i}", level)
            found["logits"] = network(x)
        elif layout.family == "segresnet":
            keep("encoder", network.encoder if hasattr(network, "encoder") else network)
            found["logits"] = network(x)
        elif layout.family == "vista3d":
            keep("encoder", network.image_encoder.encoder)
            prompts = torch.tensor(layout.case.get("class_prompts", [[7]] if "finetune" in layout.name else [[3], [5]]))
            found["logits"] = network(x, class_vector=prompts)
        else:
            for i in range(1, 5):
                keep(f"layer{i}", getattr(network, f"layer{i}"))
            found["features"] = network(x)
            found |= {"pooled": found["features"], "monai.layer3": found["layer3"], "monai.layer4": found["layer4"]}
    return found


@each_layout
def test_a_published_layout_loads_with_every_tensor_accounted_for(layout: Layout, tmp_path: Path) -> None:
    path, tensors = layout.write(tmp_path), layout.tensors()
    network, account = mp.load_backbone(path, **asked(layout)), mp.identify(path, **asked(layout))
    assert account.network == type(network).__name__
    assert {entry.name for entry in account.of("loaded")} == set(layout.of_use("load"))
    assert {entry.name for entry in account.of("left out")} == set(layout.of_use("leave out")) | set(
        layout.of_use("optional")
    )
    assert all(entry.why for entry in account.of("left out") + account.of("starts anew"))
    own = network.state_dict()
    assert {e.name for e in account.of("starts anew")} == set(own) - {e.why or e.name for e in account.of("loaded")}
    for key, name in layout.of_use("load").items():
        if not merlin(layout):  # whose kernels are moved
            assert torch.equal(own[name], tensors[key].to(own[name].dtype)), name


@each_layout
def test_the_network_computes_what_the_official_class_computed(layout: Layout, tmp_path: Path) -> None:
    network = mp.load_backbone(layout.write(tmp_path), **asked(layout))
    found, compared = outputs(network, layout), 0
    for output in layout.case["outputs"]:
        meaning = output["key"].split("/")[1]
        dilated = layout.name.startswith("medicalnet") and meaning in ("layer3", "layer4")
        if meaning not in found or dilated:
            continue
        values, stride, tolerance = layout.expected(meaning)
        got = found[meaning]
        if merlin(layout) and got.ndim == 5:
            got = got.permute(0, 1, 4, 2, 3)
        got = got.reshape(output["shape"])[tuple(slice(None, None, step) for step in stride)]
        np.testing.assert_allclose(got.numpy(), values, rtol=0, atol=max(tolerance, 1e-6), err_msg=meaning)
        compared += 1
    assert compared >= 3


@each_layout
@pytest.mark.parametrize("change", ["removed", "renamed", "reshaped"])
def test_a_changed_tensor_is_refused_and_named(layout: Layout, change: str, tmp_path: Path) -> None:
    tensors = layout.tensors()
    inner = [n for n in layout.of_use("load") if ".blocks.0." in n or ".conv2" in n or ".conv1.conv" in n]
    name = next(
        n for n in inner if tensors[n].ndim > 1 and n.endswith("weight") and "layers1.0.blocks.0.attn.qkv" not in n
    )
    tensor = tensors.pop(name)
    if change == "renamed":
        tensors[name.replace("weight", "wieght")] = tensor
    elif change == "reshaped":
        tensors[name] = tensor[:-1].clone()
    with pytest.raises(ValueError, match=r"lacks|does not fit|of no family") as refused:
        mp.load_backbone(layout.write(tmp_path, tensors), **asked(layout))
    assert name.split(".")[-2] in str(refused.value) or "of no family" in str(refused.value)


@each_layout
def test_a_foreign_tensor_is_accounted_for(layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = layout.write(tmp_path, {**layout.tensors(), "somebody.elses.weight": torch.ones(3)})
    account = mp.identify(path, **asked(layout))
    assert "somebody.elses.weight" in {entry.name for entry in account.of("left out")}
    with caplog.at_level(logging.WARNING):
        mp.load_backbone(path, **asked(layout))
    assert "somebody.elses" in caplog.text


@pytest.mark.parametrize("channels", [2, 4])
def test_other_input_channels_give_what_the_repeated_image_gave(channels: int, tmp_path: Path) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "vocomni")
    path, x = layout.write(tmp_path), layout.image()
    one, more = mp.load_backbone(path), mp.load_backbone(path, in_channels=channels)
    with torch.no_grad():
        torch.testing.assert_close(
            more.swinViT(x.expand(-1, channels, -1, -1, -1), True)[0], one.swinViT(x, True)[0], rtol=1e-4, atol=1e-4
        )


def test_other_classes_start_a_head_anew_and_say_so(tmp_path: Path) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "monai_wholebody")
    path = layout.write(tmp_path)
    network, account = mp.load_backbone(path, out_channels=3), mp.identify(path, out_channels=3)
    assert network(layout.image()).shape[1] == 3
    assert {entry.name for entry in account.of("starts anew")} == {"conv_final.2.conv.weight", "conv_final.2.conv.bias"}
    assert {entry.why for entry in account.of("starts anew")} == {"the head is for other classes"}


def test_what_a_file_does_not_tell_is_asked_for(tmp_path: Path) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "nvidia_50k")
    with pytest.raises(ValueError, match=r"family SwinUNETR, and its file does not tell all: give out_channels"):
        mp.load_backbone(layout.write(tmp_path))


def test_a_file_of_no_family_says_which_are_known(tmp_path: Path) -> None:
    torch.save({"mine.weight": torch.ones(2)}, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"of no family that is known here \(.*SwinUNETR.*begin with mine\.weight"):
        mp.load_backbone(tmp_path / "mine.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        mp.load_backbone(tmp_path / "not_there.pt")


def test_a_new_family_is_one_class(tmp_path: Path) -> None:
    class Lines(Family):
        title = "Lines"
        inputs = ("weight",)

        def names(self, tensors: Any) -> dict[str, str] | None:
            return {"line.weight": "weight"} if "line.weight" in tensors else None

        def arguments(self, tensors: Any) -> dict[str, Any]:
            return {
                "in_features": tensors["weight"].shape[1],
                "out_features": tensors["weight"].shape[0],
                "bias": False,
            }

        def build(self, **arguments: Any) -> nn.Module:
            return nn.Linear(**arguments)

    try:
        torch.save({"line.weight": torch.ones(2, 3)}, tmp_path / "line.pt")
        assert torch.equal(mp.load_backbone(tmp_path / "line.pt").weight, torch.ones(2, 3))
    finally:
        Family.registry.remove(Lines)


def test_an_adapted_network_of_any_family_trains_saves_and_loads(tmp_path: Path) -> None:
    for layout in (next(one for one in LAYOUTS if one.family == family) for family in FAMILIES):
        path = layout.write(tmp_path)
        network = mp.adapt(mp.load_backbone(path, **asked(layout)), mp.methods.LoRA(rank=1, targets=["*conv*"]))
        mp.save_adapter(network, tmp_path / f"{layout.name}.safetensors")
        mp.load_adapter(mp.load_backbone(path, **asked(layout)), tmp_path / f"{layout.name}.safetensors")


def test_a_bundle_is_its_network_with_its_weights(tmp_path: Path) -> None:
    source = BundleFolder(Path(__file__).parents[2] / "bundles" / "lora_vit_classification")
    bundle = source.small_copy(tmp_path / "mine_classification")
    trained = bundle.parser("inference").get_parsed_content("network_def")
    with pytest.raises(FileNotFoundError, match=r"model\.pt"):
        mp.load_backbone(bundle.root)
    mp.networks.save_network(trained, bundle.model)
    network = mp.load_backbone(bundle.root)
    assert not network.training
    for name, tensor in trained.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    with pytest.raises(ValueError, match=r"has no id 'layers'"):
        mp.load_backbone(bundle.root, layers=3)
    with pytest.raises(ValueError, match="does not fit"):
        mp.load_backbone(bundle.root, class_names=["one", "two"])


def test_the_command_line_lists_inspects_and_converts(run: Run, tmp_path: Path) -> None:
    assert "CC BY-NC-ND 4.0: no commercial use" in run("backbone", "list")
    layout = next(layout for layout in LAYOUTS if layout.name == "suprem_segresnet")
    path, out = layout.write(tmp_path), tmp_path / "plain.safetensors"
    assert f"{path}: SegResNet\n  network      SegResNet(" in run("backbone", "inspect", path, "--out_channels", 3)
    account = json.loads(run("backbone", "inspect", path, "--json"))
    assert {entry["fate"] for entry in account["tensors"]} == {"loaded"}
    assert "83 tensors" in run("backbone", "convert", path, out)
    assert json.loads(Path(f"{out}.json").read_text(encoding="utf-8")) == {**account, "path": str(path)}
    one, other = mp.load_backbone(path).state_dict(), mp.load_backbone(out).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "must end in .safetensors" in error_of(run, "backbone", "convert", path, tmp_path / "plain.pt")
    assert "no checkpoint at" in error_of(run, "backbone", "inspect", tmp_path / "none.pt")


def test_every_published_checkpoint_has_its_licence_and_its_place() -> None:
    for title, one in published():
        assert one.licence, title
        assert re.fullmatch(r"(github|huggingface)\.co?m?/[\w.-]+/[\w.-]+", one.where), one.name
