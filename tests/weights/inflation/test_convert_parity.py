"""What timm, torchvision and transformers computed, recorded, against MONAI's networks with converted weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monai_petl.inflation import build_from_pretrained, convert_state_dict
from tests.weights.inflation.published import Case, deviation, image, load_cases, load_expected, tensor

CASES = load_cases("convert")
EXPECTED = load_expected("convert")
SPLIT = [c for c in CASES if any("v5_key" in row for row in c["tensors"])]
BY_NAME = {c["name"]: c for c in CASES}


def checkpoint(case: Case, scheme: str = "key") -> dict[str, Tensor]:
    return {row.get(scheme, row["key"]): tensor(row) for row in case["tensors"]}


def kind_of(case: Case) -> str:
    return next((k for k in ("swin", "resnet") if k in case["name"]), "vit")


def grid_of(case: Case) -> tuple[int, int] | None:
    """Of a position table that is not square."""
    h, w = case["config"]["image_size_hw"]
    patch = case["config"].get("patch_size", 1)
    return (h // patch, w // patch) if h != w and "trained_image_size" not in case["config"] else None


def build(case: Case) -> nn.Module:
    kind, options = kind_of(case), {}
    if kind == "vit":
        options = {"num_heads": case["config"]["num_heads"], "grid": grid_of(case)}
    size = case["config"]["image_size_hw"]
    network, _ = build_from_pretrained(kind, checkpoint(case), spatial_dims=2, img_size=size, **options)
    return network.eval()


def outputs(network: nn.Module, kind: str, x: Tensor) -> dict[str, Tensor]:
    """What the fixture records, by its names."""
    found: dict[str, Tensor] = {}
    if kind == "vit":
        tokens = network(x)[1]
        found = {f"blocks.{i}": t for i, t in enumerate(tokens)}
        return {**found, "final": network.norm(tokens[-1])}
    if kind == "resnet":
        x = found["stem"] = network.act(network.bn1(network.conv1(x)))
        x = network.maxpool(x)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = found[name] = getattr(network, name)(x).clone()
        return found
    found["patch_embed"] = x = network.patch_embed(x)
    for stage in range(4):
        layer = getattr(network, f"layers{stage + 1}")[0]
        merge, layer.downsample = layer.downsample, None
        x = found[f"stages.{stage}.blocks"] = layer(x.contiguous())
        layer.downsample = merge
        x = found[f"stages.{stage}.merged"] = merge(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return found


@pytest.mark.filterwarnings("ignore:not exactly the 2D network")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@torch.no_grad()
def test_converted_networks_compute_what_the_libraries_compute(case: Case, record_property) -> None:
    found = outputs(build(case), kind_of(case), image(case))
    recorded = [row["key"].split("/")[1] for row in case["outputs"]]
    record_property("error", max(deviation(EXPECTED, case, name, found[name]) for name in recorded))


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case["name"])
def test_both_naming_schemes_of_transformers_give_identical_tensors(case: Case) -> None:
    of_file, in_memory = (
        convert_state_dict(checkpoint(case, scheme), num_heads=4, grid=grid_of(case)) for scheme in ("key", "v5_key")
    )
    assert of_file.source == in_memory.source
    assert of_file.architecture == in_memory.architecture
    assert of_file.state.keys() == in_memory.state.keys()
    assert all(torch.equal(t, in_memory.state[n]) for n, t in of_file.state.items())


def test_older_names_of_torchvision_give_identical_tensors() -> None:
    state = checkpoint(BY_NAME["tv_vit"])
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in state.items()}
    assert old.keys() != state.keys()
    new, before = convert_state_dict(state).state, convert_state_dict(old).state
    assert all(torch.equal(t, before[n]) for n, t in new.items())


def test_swin_files_of_the_original_merge_at_the_end_of_a_stage() -> None:
    """They hold index buffers and masks besides, which are left out."""
    timm = checkpoint(BY_NAME["timm_swin"])

    def earlier(name: str) -> str:
        parts = name.split(".")
        return ".".join([parts[0], str(int(parts[1]) - 1), *parts[2:]]) if ".downsample." in name else name

    original = {earlier(n): t for n, t in timm.items()}
    original["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(9, 9, dtype=torch.int64)
    original["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 9, 9)
    first, second = convert_state_dict(timm), convert_state_dict(original)
    assert (first.source, second.source) == ("timm_swin", "swin")
    assert all(torch.equal(t, second.state[n]) for n, t in first.state.items())
    assert "layers.0.blocks.1.attn_mask" in second.report.dropped
