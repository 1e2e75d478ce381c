from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from monai_petl import AdapterFileError, adapt, save_adapter
from monai_petl.methods import BottleneckAdapters, ClassHead, PromptTuning
from monai_petl.networks import PUNet, load_punet, load_punet_backbone
from tests.conftest import differing, small_punet, state_of, train_class

IMAGE = torch.randn(2, 1, 32, 32, 1, generator=torch.Generator().manual_seed(1))


def backbone(folder: Path, *classes: str, **options: Any) -> tuple[PUNet, Path]:
    """A network and its state in a file."""
    network = small_punet(*classes, **options).eval()
    torch.save(network.state_dict(), folder / "model.pt")
    return network, folder / "model.pt"


def learnt(model: Path, name: str, folder: Path, *methods: Any, also_train: tuple[str, ...] = ()) -> tuple[PUNet, Path]:
    """A class trained on the backbone of a file, and its adapter file."""
    network = small_punet()
    load_punet_backbone(network, model)
    adapt(network, list(methods) or [PromptTuning(name)], also_train, name=name)
    train_class(network, name, IMAGE)
    return network.eval(), save_adapter(network, folder / f"{name}.safetensors", name=name)


@torch.no_grad()
def margin(network: PUNet, name: str) -> torch.Tensor:
    return network.segment(IMAGE, [name])[:, 1]


# load_punet_backbone


def test_backbone_and_common_classes_are_loaded(tmp_path: Path) -> None:
    saved, path = backbone(tmp_path, "liver", "spleen")
    network = small_punet("spleen", "kidney").eval()
    kidney = state_of(network.prompts["kidney"])
    assert load_punet_backbone(network, path) == ["liver", "spleen"]
    assert torch.equal(margin(network, "spleen"), margin(saved, "spleen"))
    assert not differing(kidney, state_of(network.prompts["kidney"]))


def test_what_is_left_out_and_what_starts_anew_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved, path = backbone(tmp_path, "liver", "spleen")
    torch.save({**saved.state_dict(), "strange.weight": torch.zeros(1)}, path)
    with caplog.at_level("INFO", "monai_petl"):
        load_punet_backbone(small_punet("spleen", "kidney"), path)
    assert "left out classes liver and" in caplog.text
    assert "keeps its values: prompts.classes.kidney" in caplog.text
    assert "1 tensors are not of a PUNet and are left out: strange.weight" in caplog.text


def test_checkpoint_with_more_than_the_model_is_read(tmp_path: Path) -> None:
    saved, _ = backbone(tmp_path, "liver")
    torch.save({"model": saved.state_dict(), "optimizer": {"step": 3}}, tmp_path / "checkpoint.pt")
    network = small_punet("liver")
    assert load_punet_backbone(network, tmp_path / "checkpoint.pt") == ["liver"]
    assert not differing(state_of(saved), state_of(network))


def test_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no pre-trained network at .*none\.pt\. Run the bundle's pretrain\.json"
    ):
        load_punet_backbone(small_punet(), tmp_path / "none.pt")


@pytest.mark.parametrize("kept", [0, 10, 5000, -100])
def test_truncated_file_is_named(kept: int, tmp_path: Path) -> None:
    _, path = backbone(tmp_path, "liver")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.pt cannot be read as a state dict, it may be damaged or truncated"):
        load_punet_backbone(small_punet("liver"), path)


def test_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save(small_punet("liver"), tmp_path / "module.pt")
    with pytest.raises(
        ValueError, match=r"module\.pt is no state dict of tensors: it holds Python objects, which could run code"
    ):
        load_punet_backbone(small_punet("liver"), tmp_path / "module.pt")


@pytest.mark.parametrize("contents", [{}, {"weight": torch.zeros(2)}, torch.zeros(3), {"model": {}}])
def test_file_of_something_else_is_named(contents: Any, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt does not fit this PUNet: \d+ of \d+ tensors are missing"):
        load_punet_backbone(small_punet("liver"), tmp_path / "other.pt")


@pytest.mark.parametrize("options", [{"channels": (8, 8, 16, 16, 32)}, {"tokens_per_class": 8}, {"in_channels": 2}])
def test_other_settings_are_an_error_that_leaves_the_network_alone(options: dict[str, Any], tmp_path: Path) -> None:
    _, path = backbone(tmp_path, "liver")
    network = small_punet("liver", **options)
    before = state_of(network)
    with pytest.raises(ValueError, match="Use the network settings that the file was trained with"):
        load_punet_backbone(network, path)
    assert not differing(before, state_of(network))


# load_punet


def test_each_class_comes_from_its_file_or_the_model(tmp_path: Path) -> None:
    saved, path = backbone(tmp_path, "liver", "spleen")
    kidney, kidney_file = learnt(path, "kidney", tmp_path / "adapters")
    aorta, aorta_file = learnt(path, "aorta", tmp_path / "elsewhere", ClassHead("aorta"))
    network = load_punet(
        small_punet("liver", "kidney").eval(),
        path,
        ["kidney", "liver", "aorta"],
        adapter_dir=kidney_file.parent,
        adapters={"aorta": str(aorta_file)},
    )
    assert network.active_classes == ["kidney", "liver", "aorta"]
    for name, source in (("kidney", kidney), ("liver", saved), ("aorta", aorta)):
        assert torch.equal(margin(network.eval(), name), margin(source, name))
    assert network(IMAGE).shape == (2, 4, 32, 32, 1)


def test_without_a_choice_all_classes_of_the_network_are_segmented(tmp_path: Path) -> None:
    _, path = backbone(tmp_path, "liver", "spleen")
    assert load_punet(small_punet("spleen", "liver"), path).active_classes == ["spleen", "liver"]


def test_adapter_file_goes_before_the_model(tmp_path: Path) -> None:
    saved, path = backbone(tmp_path, "liver")
    better, file = learnt(path, "liver", tmp_path)
    network = load_punet(small_punet("liver").eval(), path, ["liver"], adapter_dir=tmp_path)
    assert torch.equal(margin(network, "liver"), margin(better, "liver"))
    assert not torch.equal(margin(network, "liver"), margin(saved, "liver"))
    network = load_punet(network, path, ["liver"], adapters={"liver": str(file)})  # again, on the same network
    assert torch.equal(margin(network.eval(), "liver"), margin(better, "liver"))


def test_class_without_weights_is_named_with_the_remedy(tmp_path: Path) -> None:
    _, path = backbone(tmp_path, "liver")
    sentence = (
        r"class 'kidney' has no weights: .*model\.pt holds liver, .* no adapter file kidney\.safetensors in .*Train it"
    )
    with pytest.raises(ValueError, match=sentence):
        load_punet(small_punet("liver", "kidney"), path, adapter_dir=tmp_path)


def test_adapters_must_be_of_classes_that_are_asked_for_and_bring_them(tmp_path: Path) -> None:
    _, path = backbone(tmp_path, "liver")
    _, file = learnt(path, "kidney", tmp_path)
    with pytest.raises(
        ValueError, match=r"adapters names the class 'aorta', which is not among the classes \['liver'\]"
    ):
        load_punet(small_punet("liver"), path, ["liver"], adapters={"aorta": str(file)})
    with pytest.raises(ValueError, match=r"kidney\.safetensors is not an adapter of the class 'aorta'"):
        load_punet(small_punet("liver"), path, ["aorta"], adapters={"aorta": str(file)})
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        load_punet(small_punet("liver"), path, ["kidney"], adapters={"kidney": str(tmp_path / "none.safetensors")})


def test_adapter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    _, path = backbone(tmp_path, "liver")
    torch.manual_seed(7)
    _, other = backbone(tmp_path / "other", "liver")
    _, file = learnt(other, "kidney", tmp_path / "other")
    with pytest.raises(AdapterFileError, match="was trained on another backbone"):
        load_punet(small_punet("liver"), path, ["kidney"], adapters={"kidney": str(file)})


@pytest.mark.parametrize(
    ("methods", "also_train"),
    [((ClassHead("kidney"), BottleneckAdapters()), ()), ((ClassHead("kidney"),), ("body.decoder",))],
)
def test_adapter_that_changes_the_body_segments_its_class_alone(
    methods: tuple[Any, ...], also_train: tuple[str, ...], tmp_path: Path
) -> None:
    _, path = backbone(tmp_path, "liver")
    kidney, file = learnt(path, "kidney", tmp_path, *methods, also_train=also_train)
    with pytest.raises(ValueError, match=r"kidney\.safetensors trained tensors that all classes share"):
        load_punet(small_punet("liver"), path, ["liver", "kidney"], adapter_dir=tmp_path)
    network = load_punet(small_punet("liver").eval(), path, ["kidney"], adapters={"kidney": str(file)})
    torch.testing.assert_close(margin(network.eval(), "kidney"), margin(kidney, "kidney"), atol=1e-6, rtol=0)
