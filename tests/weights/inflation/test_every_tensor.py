"""Every tensor of a checkpoint is loaded, left out with a reason, or refused by name; none is lost without a word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_petl.inflation import (
    Report,
    convert_state_dict,
    read_checkpoint,
    resnet_from_pretrained,
    swin_from_pretrained,
    vit_from_pretrained,
)
from tests.weights.inflation.sources import resnet, timm_swin, timm_vit

SOURCES = {"timm_vit": timm_vit, "timm_swin": timm_swin, "resnet": resnet}
FACTS = {"timm_vit": {"num_heads": 4}}


def accounted(report) -> set[str]:
    return {*report.renamed, *report.dropped}


@pytest.mark.parametrize("name", SOURCES)
def test_every_tensor_is_renamed_or_dropped_with_a_reason(name):
    state = SOURCES[name]()
    report = convert_state_dict(state, **FACTS.get(name, {})).report
    assert accounted(report) == set(state)
    assert all(reason.strip() for reason in report.dropped.values())


@pytest.mark.parametrize("name", SOURCES)
def test_a_tensor_that_is_not_known_is_refused_by_name(name):
    for extra in ("strange.weight", "norm_extra.weight", "layer9.extra"):
        with pytest.raises(ValueError, match=extra.replace(".", r"\.")):
            convert_state_dict({**SOURCES[name](), extra: torch.zeros(2)}, **FACTS.get(name, {}))


def loaded(state: dict[str, Tensor]) -> Report:
    """The report of a 2D network that is built for the state and given it."""
    source = convert_state_dict(state, num_heads=facts_of(state))
    kind = source.architecture.kind
    if kind == "resnet":
        network = resnet_from_pretrained(state, spatial_dims=2)
    elif kind == "swin":
        network = swin_from_pretrained(state, spatial_dims=2, img_size=96)
    else:
        network = vit_from_pretrained(state, spatial_dims=2, img_size=16, num_heads=4)
    assert network is not None
    return source.report


def facts_of(state: dict[str, Tensor]) -> int | None:
    return 4 if any(name.startswith(("blocks.", "encoder.layer.")) for name in state) else None


def scaled_vit() -> dict[str, Tensor]:
    """With layer scale and with the queries', keys' and values' biases of BEiT."""
    state = timm_vit()
    for block in range(2):
        bias = state.pop(f"blocks.{block}.attn.qkv.bias")
        state |= {f"blocks.{block}.attn.q_bias": bias[:24], f"blocks.{block}.attn.v_bias": bias[48:]}
        state |= {f"blocks.{block}.ls{n}.gamma": torch.rand(24) for n in (1, 2)}
    return state


def hugging_face_vit() -> dict[str, Tensor]:
    state = {"embeddings.cls_token": torch.zeros(1, 1, 24), "embeddings.position_embeddings": torch.randn(1, 17, 24)}
    shapes: dict[str, tuple[int, ...]] = {"embeddings.patch_embeddings.projection": (24, 3, 4, 4)}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        shapes |= {f"{layer}.attention.attention.{n}": (24, 24) for n in ("query", "key", "value")}
        shapes |= {f"{layer}.attention.output.dense": (24, 24), f"{layer}.intermediate.dense": (48, 24)}
        shapes |= {
            f"{layer}.output.dense": (24, 48),
            f"{layer}.layernorm_before": (24,),
            f"{layer}.layernorm_after": (24,),
        }
    shapes["layernorm"] = (24,)
    for name, shape in shapes.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return state


EVERY = {**SOURCES, "scaled_vit": scaled_vit, "hugging_face_vit": hugging_face_vit}
OPTIONAL = ("cls_token", "num_batches_tracked")  # networks without a class token exist; counts of batches are not used


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(name):
    state = EVERY[name]()
    loaded(state)
    for key in [*state][:: 3 if len(state) > 60 else 1]:
        rest = {other: tensor for other, tensor in state.items() if other != key}
        if (
            not key.endswith(OPTIONAL)
            and key not in convert_state_dict(state, num_heads=facts_of(state)).report.dropped
        ):
            with pytest.raises(ValueError):  # noqa: PT011 - by many sentences, never torch's own error
                loaded(rest)
            if state[key].ndim:
                with pytest.raises(ValueError):  # noqa: PT011
                    loaded({**state, key: torch.cat([state[key], state[key][:1]])})


def test_one_layer_scale_that_is_missing_is_named():
    state = scaled_vit()
    del state["blocks.1.ls2.gamma"]
    with pytest.raises(ValueError, match=r"lacks 1 tensors that would become blocks\.1\.scale2, though it has others"):
        convert_state_dict(state, num_heads=4)


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        ({"reg_token": torch.zeros(1, 4, 24)}, "register tokens"),
        ({"dist_token": torch.zeros(1, 1, 24)}, "a distillation token"),
        ({"blocks.0.attn.q_norm.weight": torch.zeros(6)}, "normalisation of queries and keys"),
        ({"blocks.0.mlp.w12.weight": torch.zeros(6, 24)}, r"a gated \(SwiGLU\) MLP"),
    ],
)
def test_what_monais_network_cannot_compute_is_refused_with_its_part(extra, part):
    with pytest.raises(ValueError, match=part):
        convert_state_dict({**timm_vit(), **extra}, num_heads=4)


def test_what_a_file_holds_beside_the_tensors_is_said(tmp_path, caplog):
    torch.save(
        {"model": timm_vit(), "model_ema": timm_vit(), "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "a.pth"
    )
    with caplog.at_level("INFO", "monai_petl"):
        read_checkpoint(tmp_path / "a.pth")
    assert "reads 'model'; left out: model_ema (30 tensors)" in caplog.text
    assert "epoch" not in caplog.text


@pytest.mark.parametrize("norm", ["fc_norm", "pooler.layernorm"])
def test_the_norm_behind_the_pooling_becomes_the_final_norm_and_is_said(norm):
    state = timm_vit()
    pooled = {key.replace("norm.", f"{norm}.") if key.startswith("norm.") else key: t for key, t in state.items()}
    assert f"{norm}.weight" in pooled
    converted = convert_state_dict(pooled, num_heads=4)
    assert torch.equal(converted.state["norm.weight"], state["norm.weight"])
    assert torch.equal(converted.state["norm.bias"], state["norm.bias"])
    assert converted.architecture.final_norm
    assert f"{norm}.weight is the only norm behind the blocks" in str(converted.report)


def test_half_a_norm_behind_the_pooling_is_left_out_with_the_reason():
    state = timm_vit()
    halved = {**{k: t for k, t in state.items() if not k.startswith("norm.")}, "fc_norm.bias": torch.zeros(24)}
    converted = convert_state_dict(halved, num_heads=4)
    assert converted.report.dropped == {"fc_norm.bias": "half a norm behind the pooling, without its weight"}
    assert not converted.architecture.final_norm


def test_beside_a_final_norm_it_is_left_out_with_the_reason():
    state = {**timm_vit(), "fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.zeros(24)}
    converted = convert_state_dict(state, num_heads=4)
    assert converted.report.dropped["fc_norm.weight"] == "norm behind the pooling, which the tokens do not pass"
    assert torch.equal(converted.state["norm.weight"], state["norm.weight"])
