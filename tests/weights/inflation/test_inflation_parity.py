"""The published 2.5D encoder, recorded after its own loader inflated a 2D state, against MONAI's ViT with ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monai_petl.inflation import (
    convert_state_dict,
    resize_pos_embed,
    resize_rel_bias,
    vit_from_pretrained,
)
from tests.weights.inflation.published import Case, deviation, image, load_cases, load_expected, tensor

CASES = load_cases("inflation")
EXPECTED = load_expected("inflation")
BY_NAME = {c["name"]: c for c in CASES}
TRANSFORMERS_NAMES = (  # the fixture's names as those of a BEiT file
    ("patch_embed.", "embeddings.patch_embeddings.projection."),
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("blocks.", "encoder.layer."),
    (".attn.relative_bias_table", ".attention.attention.relative_position_bias.relative_position_bias_table"),
    (".attn.out.", ".attention.output.dense."),
    (".attn.", ".attention.attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".layer_scale", ".lambda_"),
)
CLASS_TABLE = "blocks.{}.attn.rel_positional_embedding.relative_position_bias_table"


def checkpoint(case: Case) -> dict[str, Tensor]:
    state = {}
    for row in case["tensors"]:
        name = row["name"].removeprefix(case["prefix"])
        for ours, theirs in TRANSFORMERS_NAMES:
            name = name.replace(ours, theirs)
        state[name] = tensor(row)
    return state


def build(case: Case, **changes: Any) -> Any:
    config = {**case["config"], **changes}
    size, depth = config["image_size_hw"], config["patch_depth"]
    options: dict[str, Any] = {"spatial_dims": 3, "img_size": (*size, depth), "mode": config["method"]}
    if depth == 1:
        options = {"spatial_dims": 2, "img_size": size}
    return vit_from_pretrained(
        checkpoint(case),
        in_channels=config["in_channels"],
        num_heads=config["num_heads"],
        eps=config["norm_eps"],
        grid=config["source_grid"],
        **options,
    ).eval()


def recorded(case: Case, prefix: str) -> list[str]:
    names = (row["key"].split("/")[1] for row in case["outputs"])
    return [name for name in names if name.startswith(prefix)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_block_gives_the_published_features(case: Case, record_property) -> None:
    network = build(case)
    kernel = network.patch_embedding.patch_embeddings.weight
    states = network(image(case))[1]
    errors = [deviation(EXPECTED, case, name, states[int(name[7:])][:, 1:]) for name in recorded(case, "blocks.")]
    if recorded(case, "inflated_kernel"):
        assert deviation(EXPECTED, case, "inflated_kernel", kernel) <= 1e-7
    if recorded(case, "grad_inflated_kernel"):
        (states[-1][:, 1:] * image(case, "probe")).sum().backward()
        errors.append(deviation(EXPECTED, case, "grad_inflated_kernel", kernel.grad, factor=10) / 10)
    record_property("error", max(errors))


@pytest.mark.parametrize(("mode", "tolerance"), [("average", 8e-6), ("center", 3e-6)])
@torch.no_grad()
def test_a_plane_repeated_along_depth_gives_the_features_of_the_plane(mode: str, tolerance: float) -> None:
    case, plane = BY_NAME["average_c1_s5"], BY_NAME["plane_2d"]
    network = build(case, method=mode)
    states = network(image(plane).unsqueeze(-1).repeat(1, 1, 1, 1, 5))[1]
    for name in recorded(plane, "blocks."):
        row = next(row for row in plane["outputs"] if row["key"].endswith(name))
        found = states[int(name[7:])][:, 1:]
        error = (found - torch.from_numpy(EXPECTED[row["key"]])).abs().max().item()
        assert error <= tolerance


def test_resized_tables_are_the_published_ones(record_property) -> None:
    case = BY_NAME["average_resize_4_5"]
    state = {row["name"].removeprefix(case["prefix"]): tensor(row) for row in case["tensors"]}
    table = resize_rel_bias(state["blocks.0.attn.relative_bias_table"], (4, 4), (5, 5))
    record_property("error", deviation(EXPECTED, case, "relative_bias_table.0", table))
    position = resize_pos_embed(state["pos_embed"][:, 1:], (4, 4), (5, 5))
    deviation(EXPECTED, case, "pos_embed", torch.cat([state["pos_embed"][:, :1], position], 1))
    stretched = resize_rel_bias(state["blocks.0.attn.relative_bias_table"], (4, 4), (5, 5), mode="bicubic")
    assert (stretched - table).abs().max() > 0.5
    assert torch.equal(stretched[-3:], table[-3:])


def test_the_fixture_reads_as_a_beit_file() -> None:
    converted = convert_state_dict(checkpoint(BY_NAME["average_c1_s5"]))
    assert converted.source == "hf_beit"
    assert converted.architecture.relative_bias  # type: ignore[attr-defined]
    assert CLASS_TABLE.format(0) in converted.state
    assert len(converted.report.folded) == 2 * 4
    assert len(converted.report.zero_filled) == 4
