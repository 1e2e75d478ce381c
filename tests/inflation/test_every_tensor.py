"""Every tensor of a checkpoint is loaded, left out with a reason, or refused by name; none is lost without a word."""

from __future__ import annotations

import pytest
import torch

from monai_petl.inflation import convert_state_dict
from tests.inflation.sources import resnet, timm_swin, timm_vit

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


@pytest.mark.parametrize("name", SOURCES)
def test_a_tensor_that_is_missing_is_named_or_starts_anew(name):
    state = SOURCES[name]()
    whole = convert_state_dict(state, **FACTS.get(name, {}))
    for key in [key for key in state if key in whole.report.renamed][::7]:
        rest = {other: tensor for other, tensor in state.items() if other != key}
        try:
            found = convert_state_dict(rest, **FACTS.get(name, {}))
        except ValueError:
            continue
        assert set(found.state) != set(whole.state) or found.architecture != whole.architecture, key


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


def test_beside_a_final_norm_it_is_left_out_with_the_reason():
    state = {**timm_vit(), "fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.zeros(24)}
    converted = convert_state_dict(state, num_heads=4)
    assert converted.report.dropped["fc_norm.weight"] == "norm behind the pooling, which the tokens do not pass"
    assert torch.equal(converted.state["norm.weight"], state["norm.weight"])
