"""Adapter files and switches: nothing is lost, nothing foreign gets in, and errors leave the network as it was."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from monai_petl import (
    AdapterFileError,
    Method,
    adapt,
    adapter_state_dict,
    disabled,
    inspect_adapter,
    load_adapter,
    merge,
    remove_adapter,
    save_adapter,
    unmerge,
)
from monai_petl.core.adapter_file import CHECKSUM, checksum
from monai_petl.core.records import adapters_of
from monai_petl.files import tensor_files
from monai_petl.methods import BottleneckAdapters, ClassHead, PromptTuning, export_class
from monai_petl.networks import PUNet
from tests.conftest import (
    RankOne,
    SmallNet,
    differing,
    frozen,
    shake_statistics,
    small_punet,
    state_of,
    train,
    train_class,
)

X = torch.linspace(-1, 1, 3 * 16 * 16).view(3, 1, 16, 16).sin()
IMAGE = torch.linspace(-9, 9, 2 * 32 * 32).view(2, 1, 32, 32, 1).sin()


@pytest.fixture
def backbone() -> SmallNet:
    return shake_statistics(SmallNet()).eval()


@pytest.fixture
def punet() -> PUNet:
    return small_punet("liver").eval()


def trained(backbone: nn.Module, method=None, also_train=(), name: str = "default") -> nn.Module:
    """A copy of the small network with a trained adapter (a rank-one delta, if not told otherwise)."""
    network = adapt(copy.deepcopy(backbone), RankOne("linear") if method is None else method, also_train, name)
    train(network, lambda: network(X).square().mean())
    return network.eval()


def taught(backbone: PUNet, *methods: Method, also_train=(), steps: int = 2) -> PUNet:
    """A copy of a PUNet that has learned one class, under the class's name."""
    name = methods[0].class_name
    network = adapt(copy.deepcopy(backbone), list(methods), also_train, name)
    train_class(network, name, IMAGE, steps=steps)
    return network.eval()


def rewrite(path: Path, tensors: Callable[[dict], object] = id, header: Callable[[dict], object] = id) -> Path:
    """Change the tensors or the header of an adapter file in place, as a program that knows the format would."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    values = load_file(path)
    tensors(values)
    header(metadata)
    if CHECKSUM in metadata:
        metadata[CHECKSUM] = checksum(metadata, values)
    save_file(values, path, metadata)
    return path


def everything(network: nn.Module) -> tuple:
    """All that must be the same after an error, besides the tensors."""
    return (
        list(network.state_dict()),
        {n: p.requires_grad for n, p in network.named_parameters()},
        {n: m.training for n, m in network.named_modules()},
        list(adapters_of(network)),
        str(network),
    )


def output(network: nn.Module) -> Tensor:
    with frozen(network):
        return network(IMAGE if isinstance(network, PUNet) else X)


def margins_of(network: PUNet, name: str) -> Tensor:
    with frozen(network):
        return network.segment(IMAGE, [name])[:, 1]


# round trips


@pytest.mark.parametrize(
    ("method", "also_train"),
    [
        (RankOne("linear"), []),
        (RankOne("linear", rank=3), ["norm"]),
        ([RankOne("linear"), RankOne("out")], []),
        ([], ["stem", "out.bias"]),
        ([], ["*"]),
    ],
    ids=["delta", "delta-and-norm", "two-methods", "no-method", "everything"],
)
def test_a_saved_adapter_gives_equal_outputs_on_a_fresh_backbone(backbone, method, also_train, tmp_path):
    network = trained(backbone, method, also_train)
    assert not torch.equal(output(network), output(backbone))
    path = save_adapter(network, tmp_path / "new" / "folder" / "adapter.safetensors")
    assert path.is_file()
    assert load_adapter(backbone, path) is backbone
    assert torch.equal(output(backbone.eval()), output(network))
    assert differing(state_of(network), backbone.state_dict()) == set()


@pytest.mark.parametrize(
    ("methods", "also_train"),
    [
        ([PromptTuning("spleen")], []),
        ([PromptTuning("spleen", depth="encoder", own_background=True)], []),
        ([PromptTuning("spleen")], ["body.*.bias"]),
        ([ClassHead("spleen")], []),
        ([ClassHead("spleen"), BottleneckAdapters(reduction=2)], []),
        ([ClassHead("spleen")], ["body.decoder"]),
        ([PromptTuning("spleen")], ["body", "prompts.background"]),
    ],
    ids=["prompts", "encoder", "prompts-and-bias", "head", "adapters", "decoder", "full"],
)
@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
def test_a_saved_class_gives_equal_outputs_on_a_fresh_backbone(methods, also_train, arithmetic, tmp_path):
    backbone = small_punet("liver", arithmetic=arithmetic).eval()
    network = taught(backbone, *methods, also_train=also_train, steps=1)
    path = save_adapter(network, tmp_path / "spleen.safetensors")
    load_adapter(backbone, path)
    assert backbone.classes == ["liver", "spleen"]
    assert torch.equal(output(backbone.eval()), output(network))


def test_the_file_of_one_class_of_the_default_network_is_small_and_complete(tmp_path):
    backbone = shake_statistics(PUNet()).eval()
    network = adapt(copy.deepcopy(backbone), PromptTuning("spleen"))
    train_class(network, "spleen", IMAGE, steps=1)
    path = save_adapter(network, tmp_path / "spleen.safetensors", notes={"data": "40 CT volumes", "dice": 0.9})
    assert path.stat().st_size < 300_000
    assert inspect_adapter(path)["values"] == 57_344
    load_adapter(backbone, path)
    assert torch.equal(output(backbone), output(network.eval()))


def test_an_adapter_has_the_names_of_the_state_dict(backbone):
    network = trained(backbone, also_train=["norm"])
    tensors = adapter_state_dict(network)
    assert list(tensors) == [
        "linear.delta.down",
        "linear.delta.up",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())


def test_the_adapter_of_a_class_holds_its_prompts_and_nothing_else(punet):
    network = taught(punet, PromptTuning("spleen"))
    names = adapter_state_dict(network)
    assert names
    assert all(n.startswith("prompts.classes.spleen.") for n in names)
    assert sum(t.numel() for t in names.values()) == sum(p.numel() for p in network.prompts["spleen"].parameters())


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained_further(backbone, tmp_path):
    path = save_adapter(trained(backbone, also_train=["norm"]), tmp_path / "a.safetensors")
    backbone.requires_grad_(False)
    first, second = copy.deepcopy(backbone), copy.deepcopy(backbone)
    load_adapter(first, path)
    assert not any(p.requires_grad for p in first.parameters())
    assert not first.train().norm.training
    load_adapter(second, path, trainable=True)
    assert {n for n, p in second.named_parameters() if p.requires_grad} == {
        "linear.delta.down",
        "linear.delta.up",
        "norm.weight",
        "norm.bias",
    }
    assert second.train().norm.training
    train(second, lambda: second(X).square().mean())
    assert not torch.equal(output(second.eval()), output(first.eval()))


@pytest.mark.parametrize("trainable", [False, True])
def test_loading_freezes_the_backbone(backbone, tmp_path, trainable):
    path = save_adapter(trained(backbone), tmp_path / "a.safetensors")
    load_adapter(backbone, path, trainable=trainable)
    trains = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert trains == ({"linear.delta.down", "linear.delta.up"} if trainable else set())
    before = state_of(backbone)
    backbone.train()(torch.randn(4, 1, 8, 8))
    assert not differing(before, backbone.state_dict())


def test_a_merged_adapter_is_unmerged_before_another_is_saved_or_loaded(backbone, tmp_path):
    network = trained(backbone)
    path = save_adapter(network, tmp_path / "a.safetensors")
    merge(network)
    with pytest.raises(ValueError, match="merged into the backbone; call unmerge"):
        load_adapter(network, path, name="second")


def test_a_file_of_another_precision_is_converted(backbone, tmp_path):
    path = save_adapter(trained(backbone), tmp_path / "a.safetensors")
    rewrite(path, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()}))
    load_adapter(backbone, path)
    assert backbone.linear.delta.up.dtype == torch.float32


# headers


def test_the_header_says_what_made_the_file_and_what_it_fits(backbone, tmp_path):
    network = trained(backbone, [RankOne("linear", rank=2), RankOne("out")], ["norm"], name="mine")
    notes = {"data": "12 phantoms", "dice": [0.5, 0.75], "by": "Müller"}
    path = save_adapter(network, tmp_path / "a.safetensors", notes)
    found = inspect_adapter(path)
    assert found["name"] == "mine"
    assert found["network"] == "SmallNet"
    assert found["format_version"] == 2
    assert found["methods"] == [
        {"method": "RankOne", "target": "linear", "rank": 2},
        {"method": "RankOne", "target": "out", "rank": 1},
    ]
    assert found["also_train"] == ["norm"]
    assert found["notes"] == notes
    assert found["class_names"] == []
    assert found["versions"].keys() == {"monai-petl", "monai", "torch"}
    assert found["values"] == sum(t.numel() for t in adapter_state_dict(network).values())
    assert found["bytes"] == path.stat().st_size
    assert found["shapes"]["linear.delta.down"] == [2, 6]
    frozen = set(backbone.state_dict()) - set(adapter_state_dict(network))
    assert set(found["fingerprint"]) == frozen


def test_the_header_of_a_class_names_it(punet, tmp_path):
    path = save_adapter(taught(punet, PromptTuning("spleen", depth="end")), tmp_path / "a.safetensors", "one sentence")
    found = inspect_adapter(path)
    assert found["class_names"] == ["spleen"]
    assert found["methods"][0] == {
        "method": "PromptTuning",
        "class_name": "spleen",
        "depth": "end",
        "init": "random",
        "own_background": False,
    }
    assert found["notes"] == "one sentence"
    assert not any("liver" in n or "spleen" in n for n in found["fingerprint"])
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "monai_petl.adapter"


def test_notes_may_be_missing(backbone, tmp_path):
    assert inspect_adapter(save_adapter(trained(backbone), tmp_path / "a.safetensors"))["notes"] is None


def test_saving_overwrites_the_old_file_whole(backbone, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"something else")
    save_adapter(trained(backbone), path)
    assert inspect_adapter(path)["name"] == "default"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# files that do not fit


def bad_files(path: Path, kind: str) -> Path:
    """Make a mistake of the given kind out of a good file."""
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif kind == "cut within the header":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no adapter\n" * 20, encoding="utf-8")
    elif kind == "foreign":
        save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})
    elif kind == "foreign without header":
        save_file({"weight": torch.zeros(2)}, path)
    elif kind == "future":
        rewrite(path, header=lambda h: h.update(format_version="3"))
    elif kind == "no version":
        rewrite(path, header=lambda h: h.pop("format_version"))
    elif kind == "no name":
        rewrite(path, header=lambda h: h.pop("name"))
    elif kind == "broken table":
        rewrite(path, header=lambda h: h.update(methods="[{"))
    elif kind == "no fingerprint":
        rewrite(path, header=lambda h: h.pop("fingerprint"))
    elif kind == "unknown method":
        rewrite(path, header=lambda h: h.update(methods='[{"method": "Sorcery", "rank": 1}]'))
    elif kind == "unknown option":
        rewrite(path, header=lambda h: h.update(methods='[{"method": "RankOne", "sorcery": 1}]'))
    elif kind == "missing tensor":
        rewrite(path, lambda t: t.pop("linear.delta.up"))
    elif kind == "extra tensor":
        rewrite(path, lambda t: t.update(surplus=torch.zeros(1)))
    elif kind == "other shape":
        rewrite(path, lambda t: t.update({"linear.delta.up": torch.zeros(5, 1)}))
    return path


BAD = {
    "truncated": "is not an adapter file, or is damaged.*Copy or save it again",
    "cut within the header": "is not an adapter file, or is damaged",
    "empty": "is not an adapter file, or is damaged",
    "text": "is not an adapter file, or is damaged",
    "foreign": "is a safetensors file but not an adapter saved by save_adapter",
    "foreign without header": "is a safetensors file but not an adapter saved by save_adapter",
    "future": "has adapter format 3; this monai_petl reads up to 2.*Update it",
    "no version": "header is damaged.*format_version",
    "no name": "header is damaged.*name",
    "broken table": "header is damaged",
    "no fingerprint": "header is damaged.*fingerprint",
    "unknown method": "made with the method Sorcery, which is not known here. Import the module",
    "unknown option": "RankOne.*sorcery",
    "missing tensor": "tensors missing in the file: linear.delta.up; left over in the file: none",
    "extra tensor": "tensors missing in the file: none; left over in the file: surplus",
    "other shape": r"linear.delta.up has shape \[5, 1\] in the file, the network needs \[6, 1\]",
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_with_its_reason_and_the_network_is_as_it_was(backbone, kind, training, tmp_path):
    path = save_adapter(trained(backbone, also_train=["norm"]), tmp_path / "a.safetensors")
    network = adapt(copy.deepcopy(backbone), RankOne("out"), name="other")
    network.stem.requires_grad_(True)  # neither all frozen nor all trained
    network.norm.weight.requires_grad_(True)
    network.train(training)
    before = everything(network), state_of(network), output(network)
    with pytest.raises(ValueError, match=f"(?s){BAD[kind]}") as error:
        load_adapter(network, bad_files(path, kind))
    assert isinstance(error.value, AdapterFileError)
    assert str(path) in str(error.value)
    assert everything(network) == before[0]
    assert differing(before[1], network.state_dict()) == set()
    assert torch.equal(output(network), before[2])


@pytest.mark.parametrize("kind", ["truncated", "foreign", "future", "no version", "no name", "broken table", "text"])
def test_inspection_gives_the_same_reasons(backbone, kind, tmp_path):
    path = save_adapter(trained(backbone), tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=f"(?s){BAD[kind]}"):
        inspect_adapter(bad_files(path, kind))


@pytest.mark.parametrize("action", [lambda path: load_adapter(SmallNet(), path), inspect_adapter])
def test_a_missing_file_is_named(tmp_path, action):
    with pytest.raises(FileNotFoundError, match=r"no adapter file .*nowhere\.safetensors"):
        action(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        action(tmp_path)


def test_another_backbone_is_refused_and_the_tensors_that_differ_are_named(backbone, tmp_path):
    path = save_adapter(trained(backbone), tmp_path / "a.safetensors")
    with torch.no_grad():
        backbone.out.weight[0, 0] += 1e-3
    before = everything(backbone)
    with pytest.raises(AdapterFileError, match=r"another backbone \(SmallNet\).* 1 with other values .*\(out.weight\)"):
        load_adapter(backbone, path)
    assert everything(backbone) == before


def test_running_statistics_belong_to_the_backbone(backbone, tmp_path):
    path = save_adapter(trained(backbone), tmp_path / "a.safetensors")
    backbone.norm.running_mean += 1
    with pytest.raises(AdapterFileError, match=r"other values or shapes \(norm.running_mean\)"):
        load_adapter(backbone, path)


def test_a_backbone_of_another_size_or_kind_is_refused(backbone, tmp_path):
    path = save_adapter(trained(backbone), tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"other values or shapes \(stem.0.weight, stem.0.bias, .* and \d+ more"):
        load_adapter(SmallNet(width=5), path)
    with pytest.raises(AdapterFileError, match=r"this Linear has \d+ missing \(stem.0.weight"):
        load_adapter(nn.Linear(2, 2), path)


def test_backbone_tensors_that_the_adapter_brings_may_differ(backbone, tmp_path):
    network = trained(backbone, also_train=["norm"])
    path = save_adapter(network, tmp_path / "a.safetensors")
    nn.init.ones_(backbone.norm.weight)
    load_adapter(backbone, path)
    assert torch.equal(output(backbone), output(network))


def test_a_class_of_another_prompt_size_is_refused(punet, tmp_path):
    path = save_adapter(taught(punet, PromptTuning("spleen")), tmp_path / "a.safetensors")
    other = small_punet("liver", tokens_per_class=5)
    other.body.load_state_dict(punet.body.state_dict())
    with pytest.raises(AdapterFileError, match=r"prompts\.background"):
        load_adapter(other, path)


def test_a_failed_load_brings_back_a_class_of_that_name(punet, tmp_path):
    path = save_adapter(taught(punet, PromptTuning("liver")), tmp_path / "a.safetensors")
    rewrite(path, lambda tensors: tensors.pop("prompts.classes.liver.head_tokens"))
    before, logits = state_of(punet), output(punet)
    with pytest.raises(AdapterFileError, match=r"missing in the file: prompts.classes.liver.head_tokens"):
        load_adapter(punet, path)
    assert differing(before, punet.state_dict()) == set()
    assert torch.equal(output(punet), logits)


def test_a_name_that_is_taken_is_refused_and_another_may_be_given(backbone, tmp_path):
    path = save_adapter(trained(backbone), tmp_path / "a.safetensors")
    network = trained(backbone, RankOne("out"))
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        load_adapter(network, path)
    load_adapter(network, path, name="second")
    assert list(adapters_of(network)) == ["default", "second"]


@pytest.mark.parametrize("place", ["file/adapter.safetensors", "file/folder/adapter.safetensors", "folder"])
def test_a_place_that_cannot_be_written_to_is_named_and_nothing_is_half_written(backbone, place, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(OSError, match="cannot write the adapter to") as error:
        save_adapter(trained(backbone), tmp_path / place)
    assert str(tmp_path / place) in str(error.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_an_old_file_survives_a_failing_save(backbone, tmp_path, monkeypatch):
    network = trained(backbone)
    path = save_adapter(network, tmp_path / "a.safetensors")
    before = path.read_bytes()

    def disk_full(*_args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tensor_files, "save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(network, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_network_without_adapter_says_so(backbone, tmp_path):
    for action in (
        adapter_state_dict,
        lambda network: save_adapter(network, tmp_path / "a"),
        remove_adapter,
        merge,
        unmerge,
    ):
        with pytest.raises(ValueError, match="has not got any adapter; it has: none"):
            action(backbone)
    network = adapt(backbone, RankOne("linear"), name="mine")
    with pytest.raises(ValueError, match="has not got an adapter 'yours'; it has: mine"):
        remove_adapter(network, "yours")


# several adapters


def test_files_of_two_people_compose_into_one_network(punet, tmp_path):
    paths, expected = [], []
    for name in ("spleen", "left kidney"):
        network = taught(punet, PromptTuning(name))
        paths.append(save_adapter(network, tmp_path / f"{name}.safetensors", notes=f"by the {name} group"))
        expected.append(margins_of(network, name))
    liver = margins_of(punet, "liver")
    for path in paths:
        load_adapter(punet, path)
    assert punet.classes == ["liver", "spleen", "left kidney"]
    for name, margins in zip(punet.classes, (liver, *expected), strict=True):
        assert torch.equal(margins_of(punet, name), margins)
    torch.testing.assert_close(output(punet), torch.stack([0 * liver, liver, *expected], 1), atol=1e-5, rtol=1e-5)
    assert list(adapters_of(punet)) == ["spleen", "left kidney"]


def test_prompts_and_convolution_heads_of_two_people_compose(punet, tmp_path):
    prompted, headed = taught(punet, PromptTuning("spleen")), taught(punet, ClassHead("pancreas"))
    for network in (headed, prompted):
        load_adapter(punet, save_adapter(network, tmp_path / f"{network.classes[-1]}.safetensors"))
    for name, network in (("spleen", prompted), ("pancreas", headed)):
        assert torch.equal(margins_of(punet, name), margins_of(network, name))


def test_each_of_several_adapters_is_saved_on_its_own(punet, tmp_path):
    network = taught(punet, PromptTuning("spleen"))
    adapt(network, PromptTuning("pancreas"), name="pancreas")
    train_class(network, "pancreas", IMAGE)
    network.eval()
    save_adapter(network, tmp_path / "last.safetensors")
    save_adapter(network, tmp_path / "first.safetensors", name="spleen")
    assert inspect_adapter(tmp_path / "last.safetensors")["class_names"] == ["pancreas"]
    assert inspect_adapter(tmp_path / "first.safetensors")["class_names"] == ["spleen"]
    load_adapter(punet, tmp_path / "last.safetensors")
    load_adapter(punet, tmp_path / "first.safetensors")
    for name in ("spleen", "pancreas", "liver"):
        assert torch.equal(margins_of(punet, name), margins_of(network, name))


def test_a_class_that_belongs_to_an_adapter_is_not_taken_over_by_another(punet, tmp_path):
    network = taught(punet, PromptTuning("spleen"))
    path = save_adapter(network, tmp_path / "a.safetensors")
    before = state_of(network)
    for action in (
        lambda: load_adapter(network, path, name="again"),
        lambda: adapt(network, PromptTuning("spleen"), name="again"),
        lambda: adapt(network, ClassHead("spleen"), name="again"),
    ):
        with pytest.raises(ValueError, match="class 'spleen' belongs to adapter 'spleen'; remove it first"):
            action()
    assert differing(before, network.state_dict()) == set()


# removing


@pytest.mark.parametrize("also_train", [[], ["norm", "stem.0.bias"]])
def test_removing_an_adapter_gives_the_backbone_back(backbone, also_train):
    network = trained(backbone, also_train=also_train)
    remove_adapter(network)
    assert list(network.state_dict()) == list(backbone.state_dict())
    assert differing(state_of(backbone), network.state_dict()) == set()
    assert torch.equal(output(network), output(backbone))
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.train().norm.training
    assert not adapters_of(network)


def test_removing_a_class_gives_back_what_it_took_the_place_of(punet):
    before, logits = state_of(punet), output(punet)
    for method in (PromptTuning("liver"), ClassHead("liver")):
        network = taught(punet, method)
        assert network.classes == ["liver"]
        remove_adapter(network, "liver")
        assert differing(before, network.state_dict()) == set()
        assert list(network.state_dict()) == list(before)
        assert torch.equal(output(network), logits)


def test_removing_one_adapter_leaves_the_others(backbone):
    first = trained(backbone, name="first")
    network = adapt(copy.deepcopy(first), RankOne("out"), name="second")
    train(network, lambda: network(X).square().mean())
    remove_adapter(network, "second")
    assert torch.equal(output(network.eval()), output(first))


def test_removing_a_merged_adapter_gives_the_backbone_back(backbone):
    network = merge(trained(backbone))
    remove_adapter(network)
    assert differing(state_of(backbone), network.state_dict()) == set()


# merging


def test_merging_keeps_the_outputs_and_unmerging_restores_every_bit(backbone):
    network = trained(backbone)
    before, expected = state_of(network), output(network)
    assert merge(network) is network
    torch.testing.assert_close(output(network), expected, atol=1e-6, rtol=1e-5)
    assert differing(before, network.state_dict()) == {"linear.weight"}
    with pytest.raises(ValueError, match=r"'default' is merged already; call unmerge\(network, 'default'\)"):
        merge(network)
    assert unmerge(network) is network
    assert differing(before, network.state_dict()) == set()
    assert torch.equal(output(network), expected)
    with pytest.raises(ValueError, match="'default' is not merged"):
        unmerge(network)
    assert differing(before, network.state_dict()) == set()


def test_a_merged_adapter_cannot_be_saved_before_it_is_unmerged(backbone, tmp_path):
    network = merge(trained(backbone))
    with pytest.raises(ValueError, match=r"'default' is merged into the backbone; call unmerge\(network\)"):
        save_adapter(network, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    load_adapter(backbone, save_adapter(unmerge(network), tmp_path / "a.safetensors"))
    assert torch.equal(output(backbone), output(network))


@pytest.mark.parametrize("method", [PromptTuning("spleen"), ClassHead("spleen")])
def test_what_depends_on_the_input_cannot_be_merged_and_says_what_to_do(punet, method):
    network = taught(punet, method)
    expected = output(network)
    with pytest.raises(TypeError, match=r"cannot be merged: its delta depends on the input\..*save_adapter"):
        merge(network)
    assert not adapters_of(network)["spleen"].merged
    assert torch.equal(output(network), expected)


@dataclass(frozen=True)
class Unmergeable(Method):
    """Adds nothing and cannot be merged."""

    def attach(self, network: nn.Module, name: str) -> None:
        pass

    def detach(self, network: nn.Module, name: str) -> None:
        pass


def test_when_one_of_several_methods_cannot_be_merged_none_is(backbone):
    network = trained(backbone, [RankOne("linear"), Unmergeable()])
    before = state_of(network)
    with pytest.raises(TypeError, match="Unmergeable cannot be merged"):
        merge(network)
    assert differing(before, network.state_dict()) == set()


# switching off


@pytest.mark.parametrize(
    ("method", "also_train"),
    [(RankOne("linear"), []), (RankOne("linear"), ["norm", "out"]), ([], ["stem"])],
    ids=["delta", "delta-and-backbone", "backbone"],
)
def test_within_disabled_the_network_is_the_untouched_backbone(backbone, method, also_train):
    network = trained(backbone, method, also_train)
    before, adapted = state_of(network), output(network)
    with disabled(network) as same:
        assert same is network
        assert torch.equal(output(network), output(backbone))
    assert torch.equal(output(network), adapted)
    assert differing(before, network.state_dict()) == set()


@pytest.mark.parametrize("methods", [[PromptTuning("spleen")], [ClassHead("spleen"), BottleneckAdapters()]])
def test_within_disabled_a_punet_is_the_untouched_backbone(punet, methods):
    network = taught(punet, *methods, also_train=["body.*.bias"])
    adapted = output(network)
    with disabled(network), torch.no_grad():
        assert network.active_classes == ["liver"]
        assert torch.equal(output(network), output(punet))
    assert network.active_classes == ["liver", "spleen"]
    assert torch.equal(output(network), adapted)


def test_an_exception_within_disabled_leaves_the_adapter_on(backbone):
    network = trained(backbone, also_train=["norm"])
    before, adapted = state_of(network), output(network)
    with pytest.raises(RuntimeError, match="in the block"), disabled(network):
        raise RuntimeError("in the block")
    assert torch.equal(output(network), adapted)
    assert differing(before, network.state_dict()) == set()


def test_one_of_several_adapters_can_be_disabled(backbone):
    first = trained(backbone, name="first")
    network = adapt(copy.deepcopy(first), RankOne("out"), ["norm"], name="second")
    train(network, lambda: network(X).square().mean())
    adapted = output(network.eval())
    with disabled(network, "second"):
        assert torch.equal(output(network), output(first))
    with disabled(network):
        assert torch.equal(output(network), output(backbone))
    assert torch.equal(output(network), adapted)


def test_two_adapters_cannot_train_the_same_tensor_of_the_backbone(backbone):
    network = trained(backbone, [], ["norm"], name="first")
    before, adapted = state_of(network), output(network)
    with pytest.raises(ValueError, match=r"'first' trains norm\.weight .*activate.*remove_adapter\(network, 'first'\)"):
        adapt(network, [RankOne()], ["norm", "out"], name="second")
    assert list(adapters_of(network)) == ["first"]
    assert state_of(network).keys() == before.keys()
    assert differing(before, network.state_dict()) == set()
    assert torch.equal(output(network), adapted)


def test_a_disabled_adapter_is_not_saved(backbone, tmp_path):
    network = trained(backbone, also_train=["norm"])
    with disabled(network), pytest.raises(ValueError, match="switched off; save it outside"):
        save_adapter(network, tmp_path / "adapter.safetensors")
    assert not any(tmp_path.iterdir())


def test_an_adapter_trained_on_top_of_another_needs_it(backbone, tmp_path):
    network = trained(backbone, RankOne(), name="below")
    save_adapter(network, tmp_path / "below.safetensors", name="below")
    adapt(network, [], ["norm"], name="above")
    train(network, lambda: network(X).square().mean())
    save_adapter(network, tmp_path / "above.safetensors", name="above")
    plain = copy.deepcopy(backbone)
    with pytest.raises(AdapterFileError, match=r"has \d+ missing \(linear\.delta"):
        load_adapter(plain, tmp_path / "above.safetensors")
    load_adapter(plain, tmp_path / "below.safetensors")
    load_adapter(plain, tmp_path / "above.safetensors")
    assert torch.equal(output(plain.eval()), output(network.eval()))


def test_an_adapter_does_not_need_what_was_attached_later(punet, tmp_path):
    network = adapt(copy.deepcopy(punet), PromptTuning("kidney"), name="kidney")
    train_class(network, "kidney", IMAGE)
    adapt(network, [ClassHead("spleen"), BottleneckAdapters()], ["body.*.bias"], name="spleen")
    train_class(network, "spleen", IMAGE)
    save_adapter(network, tmp_path / "kidney.safetensors", name="kidney")
    export_class(network, "liver", tmp_path / "liver.safetensors")
    fresh = copy.deepcopy(punet)
    load_adapter(fresh, tmp_path / "kidney.safetensors")
    fresh.prompts.remove_class("liver")
    load_adapter(fresh, tmp_path / "liver.safetensors")
    assert list(adapters_of(network)) == ["kidney", "spleen"]
    assert set(fresh.classes) == {"kidney", "liver"}


def test_heads_of_several_classes_are_exchanged(punet, tmp_path):
    network = copy.deepcopy(punet)
    for name in ("kidney", "spleen"):
        adapt(network, ClassHead(name), name=name)
    for name in ("kidney", "spleen"):
        save_adapter(network, tmp_path / f"{name}.safetensors", name=name)
    for name in ("spleen", "kidney"):
        load_adapter(punet, tmp_path / f"{name}.safetensors")
    network.active_classes = punet.active_classes = ["kidney", "spleen"]
    with frozen(network, punet):
        assert torch.equal(network.eval()(IMAGE), punet.eval()(IMAGE))


def test_a_class_that_comes_back_is_where_the_network_went_meanwhile(punet):
    network = adapt(punet, ClassHead("liver"), name="again")
    network.train().double()
    with disabled(network):
        assert network.eval()(IMAGE.double()).dtype == torch.float64
    assert not any(module.training for module in network.modules())
    before = state_of(network)
    network(IMAGE.double())
    assert differing(before, network.state_dict()) == set()
    network.float()
    remove_adapter(network)
    assert network(IMAGE).dtype == torch.float32


def test_without_its_only_active_class_a_network_segments_the_others(punet):
    network = adapt(punet, PromptTuning("new"), name="new")
    network.active_classes = ["new"]
    remove_adapter(network)
    assert network.active_classes == ["liver"]


def test_disabled_shows_the_class_that_an_adapter_took_the_place_of(punet):
    image = torch.rand(1, 1, 16, 16, 1)
    punet.eval()
    with torch.no_grad():
        before, classes = punet(image), punet.classes
    for method in (PromptTuning(classes[0]), ClassHead(classes[0])):
        network = adapt(copy.deepcopy(punet), method, name="again")
        with torch.no_grad():
            adapted = network(image)
            with disabled(network):
                assert network.classes == classes
                assert torch.equal(network(image), before)
            assert torch.equal(network(image), adapted)
            assert not torch.equal(adapted, before)
            remove_adapter(network)
            assert torch.equal(network(image), before)


def test_disabled_shows_the_backbones_classes_when_only_the_new_one_was_active(punet):
    known = punet.classes
    network = adapt(punet, PromptTuning("new"), name="new")
    network.active_classes = ["new"]
    with disabled(network):
        assert network.active_classes == known
    assert network.active_classes == ["new"]


def test_disabled_blocks_may_be_nested(backbone):
    network = trained(backbone, also_train=["norm"])
    adapted = output(network)
    with disabled(network):
        with disabled(network):
            assert torch.equal(output(network), output(backbone))
        assert torch.equal(output(network), output(backbone))
    assert torch.equal(output(network), adapted)


def test_disabled_classes_keep_their_place(punet):
    network = taught(punet, PromptTuning("spleen"))
    adapt(network, PromptTuning("pancreas"), name="pancreas")
    adapted = output(network.eval())
    with disabled(network):
        assert network.active_classes == ["liver"]
    with disabled(network, "spleen"):
        assert network.active_classes == ["liver", "pancreas"]
    assert network.active_classes == ["liver", "spleen", "pancreas"]
    assert torch.equal(output(network), adapted)
    network.active_classes = ["pancreas", "liver"]
    with disabled(network):
        assert network.active_classes == ["liver"]
    assert network.active_classes == ["pancreas", "liver"]


def test_a_merged_adapter_is_disabled_too(backbone):
    network = merge(trained(backbone))
    before, adapted = state_of(network), output(network)
    with disabled(network):
        assert torch.equal(output(network), output(backbone))
    assert differing(before, network.state_dict()) == set()
    assert torch.equal(output(network), adapted)


def test_a_method_that_cannot_be_switched_off_says_so_and_changes_nothing(backbone):
    network = trained(backbone, [RankOne("linear"), Unmergeable()], ["norm"])
    before, adapted = state_of(network), output(network)
    with pytest.raises(TypeError, match="Unmergeable cannot be switched off"), disabled(network):
        pass
    assert differing(before, network.state_dict()) == set()
    assert torch.equal(output(network), adapted)


def test_a_network_without_adapters_is_disabled_already(backbone):
    with disabled(backbone):
        assert output(backbone).isfinite().all()


def test_the_fingerprint_in_the_header_is_plain_json_with_a_table_for_each_module(backbone, tmp_path):
    path = save_adapter(trained(backbone), tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        fingerprint = json.loads(file.metadata()["fingerprint"])
    assert fingerprint["out"].keys() == {"weight", "bias"}
    assert fingerprint["stem"]["1"].keys() == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert "linear" in fingerprint
    assert all(len(base64.urlsafe_b64decode(value)) == 6 for value in fingerprint["out"].values())


def of_version_1(path: Path, backbone: nn.Module) -> Path:
    """The file as it was written when the fingerprint had whole names and hexadecimal hashes."""

    def hashed(tensor: Tensor) -> str:
        text = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        return hashlib.blake2b(text + tensor.numpy().tobytes(), digest_size=6).hexdigest()

    hashes = {n: hashed(t) for n, t in backbone.state_dict().items()}
    return rewrite(path, header=lambda h: h.update(format_version="1", fingerprint=json.dumps(hashes)))


def test_a_file_of_the_first_version_is_read_and_checked_as_well(backbone, tmp_path):
    network = trained(backbone)
    path = of_version_1(save_adapter(network, tmp_path / "a.safetensors"), backbone)
    assert inspect_adapter(path)["format_version"] == 1
    assert inspect_adapter(path)["fingerprint"].keys() == backbone.state_dict().keys()
    other = copy.deepcopy(backbone)
    assert torch.equal(output(load_adapter(backbone, path)), output(network))
    nn.init.zeros_(other.out.bias)
    with pytest.raises(AdapterFileError, match=r"1 with other values or shapes \(out.bias\)"):
        load_adapter(other, path)


def test_a_name_taken_by_another_method_is_refused_with_both_and_the_remedy(backbone, tmp_path):
    path = save_adapter(trained(backbone), tmp_path / "a.safetensors")
    network = adapt(backbone, Unmergeable())
    with pytest.raises(
        ValueError, match=r"'default' already \(Unmergeable\); to attach RankOne, remove .*another name"
    ):
        load_adapter(network, path)
    assert list(adapters_of(load_adapter(network, path, name="second"))) == ["default", "second"]
