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
    assert ("left out nothing" in caplog.text) == (not heads)


def test_a_whole_network_is_loaded_with_another_number_of_classes(tmp_path, caplog):
    torch.save(named("module.", WHOLE), tmp_path / "a.pt")
    with caplog.at_level("INFO", "monai_petl"):
        loaded = load_swin_unetr(network(out_channels=5), tmp_path / "a.pt").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in WHOLE.items() if not n.startswith("out."))
    assert "(the whole network); left out nothing; starts anew: out" in caplog.text


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


def test_a_file_of_objects_is_refused_without_torchs_advice_to_run_it(tmp_path):
    torch.save({"a": network()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds Python objects") as error:
        load_swin_unetr(network(), tmp_path / "a.pt")
    assert "weights_only=False" not in str(error.value)
