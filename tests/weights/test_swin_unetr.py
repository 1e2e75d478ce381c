"""Checkpoints of a SwinUNETR under all the names that they come with, each tensor accounted for."""

from __future__ import annotations

import re

import pytest
import torch
from monai.networks.nets import SwinUNETR
from torch import Tensor

from monai_petl.networks import load_swin_unetr

SMALL = {"in_channels": 1, "out_channels": 3, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
HEADS = {
    "rotation_head.weight": torch.zeros(4, 8),
    "contrastive_head.bias": torch.zeros(8),
    "conv.0.weight": torch.zeros(2, 2),
}


def network(seed: int = 0, **options) -> SwinUNETR:
    torch.manual_seed(seed)
    return SwinUNETR(**{"feature_size": 12, **SMALL, **options})


WHOLE = network(1).state_dict()
VIT = {n.removeprefix("swinViT."): t for n, t in WHOLE.items() if n.startswith("swinViT.")}


def named(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def old(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace("linear1", "fc1").replace("linear2", "fc2"): t for n, t in state.items()}


SOURCES = {
    "swin_vit, with heads": {**named("swin_vit.", VIT), **HEADS},
    "module.swin_vit, with heads": named("module.", {**named("swin_vit.", VIT), **HEADS}),
    "swinViT, with heads": {**named("swinViT.", VIT), **HEADS},
    "module.swinViT": named("module.", named("swinViT.", VIT)),
    "the names alone": VIT,
    "module., linear layers as fc1": named("module.", old(VIT)),
    "compiled and distributed": named("_orig_mod.module.", named("swin_vit.", VIT)),
    "Lightning": named("model.", named("swinViT.", VIT)),
    "Lightning, with a loss beside": {**named("model.swinViT.", VIT), "criterion.weight": torch.zeros(2)},
    "module., with heads outside": {**named("module.swin_vit.", VIT), **HEADS},
    "backbone": named("backbone.", VIT),
    "encoder of a student": named("student.encoder.", VIT),
    "of one's own": named("_model.swin.", named("swinViT.", VIT)),
}


@pytest.mark.parametrize("key", [None, "state_dict", "model", "network_weights"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_transformer_is_loaded_whatever_its_names(source, key, tmp_path, caplog):
    state = SOURCES[source]
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "a.pt")
    before = network().state_dict()
    with caplog.at_level("INFO", "monai_petl"):
        loaded = load_swin_unetr(network(), tmp_path / "a.pt").state_dict()
    assert all(torch.equal(loaded[f"swinViT.{n}"], t) for n, t in VIT.items())
    assert all(torch.equal(loaded[n], t) for n, t in before.items() if not n.startswith("swinViT."))
    assert f"loaded {len(VIT)} tensors (the transformer)" in caplog.text
    assert re.search("starts anew: decoder1, .*encoder1, .*out", caplog.text)
    heads = [name for name in HEADS if any(given.endswith(name) for given in state)]
    assert all(name in caplog.text for name in heads)
    assert ("left out nothing" in caplog.text) == (not heads and "beside" not in source)
    assert ("left out 1 outside of the network (criterion.weight)" in caplog.text) == ("beside" in source)


def test_a_whole_network_is_loaded_with_another_number_of_classes(tmp_path, caplog):
    torch.save(named("module.", WHOLE), tmp_path / "a.pt")
    with caplog.at_level("INFO", "monai_petl"):
        loaded = load_swin_unetr(network(out_channels=5), tmp_path / "a.pt").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in WHOLE.items() if not n.startswith("out."))
    left_out = "left out 2 of a head of other classes (out.conv.conv.weight, out.conv.conv.bias); starts anew: out"
    assert f"(the whole network); {left_out}" in caplog.text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.update(strange=torch.zeros(1)), r"1 tensors are left over \(strange\)"),
        (
            lambda s: s.pop("swinViT.patch_embed.proj.weight"),
            r"1 tensors are missing \(swinViT\.patch_embed\.proj\.weight\)",
        ),
        (lambda s: s.pop("encoder2.layer.conv1.conv.weight"), r"missing \(encoder2\.layer\.conv1\.conv\.weight\)"),
        (
            lambda s: s.update({"swinViT.patch_embed.proj.bias": torch.zeros(48)}),
            r"bias, \(48,\) in the file and \(12,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, sentence, tmp_path):
    state = dict(WHOLE)
    change(state)
    torch.save(state, tmp_path / "a.pt")
    untouched = network()
    before = {n: t.clone() for n, t in untouched.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        load_swin_unetr(untouched, tmp_path / "a.pt")
    assert all(torch.equal(t, before[n]) for n, t in untouched.state_dict().items())


@pytest.mark.parametrize(
    ("state", "options", "sentence"),
    [
        (WHOLE, {"feature_size": 24}, r"has feature_size 12, .* the network feature_size 24, "),
        (VIT, {"depths": (2, 1, 1, 1)}, r"depths \(1, 1, 1, 1\), .* the network .* depths \(2, 1, 1, 1\), "),
        (VIT, {"num_heads": (1, 2, 4, 4)}, r"num_heads \(2, 2, 2, 2\), .* num_heads \(1, 2, 4, 4\), "),
        (WHOLE, {"in_channels": 4}, r"in_channels 1, .* in_channels 4, "),
        (WHOLE, {"spatial_dims": 2}, r"spatial_dims 3, .* spatial_dims 2;"),
        (WHOLE, {"use_v2": True}, r"spatial_dims 3, the network .* use_v2=True;"),
        ({"a.weight": torch.zeros(1)}, {}, r"The file has no transformer of a SwinUNETR, the network feature_size 12"),
    ],
)
def test_settings_that_differ_are_named(state, options, sentence, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=sentence):
        load_swin_unetr(network(**options), tmp_path / "a.pt")


def test_student_and_teacher_in_one_state_are_refused_and_beside_each_other_said(tmp_path, caplog):
    torch.save({**named("student.", VIT), **named("teacher.", VIT)}, tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"holds the network 2 times, under 'student\.' and 'teacher\.'; save the tensors"
    ):
        load_swin_unetr(network(), tmp_path / "a.pt")
    torch.save({"student": VIT, "teacher": {n: t + 1 for n, t in VIT.items()}, "epoch": 3}, tmp_path / "a.pt")
    with caplog.at_level("INFO", "monai_petl"):
        load_swin_unetr(network(), tmp_path / "a.pt")
    assert f"reads 'student'; left out: teacher ({len(VIT)} tensors)" in caplog.text


def test_a_file_of_objects_is_refused_without_torchs_advice_to_run_it(tmp_path):
    torch.save({"a": network()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds Python objects") as error:
        load_swin_unetr(network(), tmp_path / "a.pt")
    assert "weights_only=False" not in str(error.value)
