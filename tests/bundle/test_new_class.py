from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from monai_petl.bundle import BundleFolder
from monai_petl.bundle.new_class import new_class
from monai_petl.bundle.verify import verify
from tests.bundles.helpers import (
    BUNDLES,
    CLASSIFIER,
    INFLATED,
    LORA,
    PUNET,
    Bundle,
    checkpoint_state,
    named,
    state_in,
)
from tests.marks import slow_unless


def shrink(bundle: Bundle, folder: Path) -> Path:
    return BundleFolder(bundle.path).small_copy(folder / bundle.name).root


def with_network(root: Path) -> dict[str, Any]:
    torch.manual_seed(5)
    state = BundleFolder(root).parser("inference").get_parsed_content("network_def").state_dict()
    (root / "models").mkdir()
    torch.save(state, root / "models" / "model.pt")
    return state


@pytest.mark.parametrize("bundle", slow_unless(lambda bundle: "vit" in bundle.name, BUNDLES), ids=named)
def test_the_copy_keeps_what_fits_and_infers_and_learns(bundle: Bundle, tmp_path: Path) -> None:
    root = shrink(bundle, tmp_path / "source")
    old = with_network(root)
    task = bundle.name.rsplit("_", 1)[1]
    made = new_class(root, tmp_path / f"thorax_{task}", ["lung", "heart", "liver"])
    assert made.classes == ("lung", "heart", "liver")
    copy = BundleFolder(made.path)
    assert copy.class_names == ["lung", "heart", "liver"]
    state = state_in(copy.model)
    assert list(state) == list(copy.parser("inference").get_parsed_content("network_def").state_dict())
    kept = [n for n in state if n in old and old[n].shape == state[n].shape and n not in made.fresh]
    assert len(kept) == made.kept > len(made.fresh) > 0
    assert all(torch.equal(state[n], old[n]) for n in kept)
    checks = (
        "files",
        "form of JSON",
        "metadata",
        "portability",
        "ids",
        "agreement",
        "overrides",
        "weights",
        "model card",
    )
    found = verify(made.path, None, (*checks, "train", "infer"))
    assert found.ok, str(found)


def test_pretrained_weights_are_put_into_the_copy(tmp_path: Path) -> None:
    checkpoint = tmp_path / "vit.safetensors"
    save_file(checkpoint_state(), checkpoint)
    root = shrink(INFLATED, tmp_path / "source")
    made = new_class(root, tmp_path / "knee_segmentation", ["cartilage"], checkpoint)
    unused = [name for name in made.fresh if name.startswith("backbone") and "norm_cross_attn" not in name]
    assert not unused
    assert any(name.startswith("decoder") for name in made.fresh)
    assert made.kept > 20


def test_a_new_class_of_punet_keeps_the_prompts_of_the_base_classes(tmp_path: Path) -> None:
    root = shrink(PUNET, tmp_path / "source")
    old = with_network(root)
    made = new_class(root, tmp_path / "pancreas_segmentation", ["liver", "spleen", "aorta", "pancreas"])
    state = state_in(made.path / "models" / "model.pt")
    prompts = [n for n in state if "prompts.classes.liver" in n]
    assert prompts
    assert all(torch.equal(state[n], old[n]) for n in prompts)
    assert made.fresh
    assert all("pancreas" in name for name in made.fresh)
    train = BundleFolder(made.path).config("train")
    assert train["base_classes"] == ["liver", "spleen", "aorta"]
    assert train["new_class"] == "pancreas"


def test_bad_input_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    root = shrink(LORA, tmp_path / "source")
    out = tmp_path / "new_segmentation"
    with pytest.raises(FileNotFoundError, match=r"no network at .*model\.pt; give the pre-trained file"):
        new_class(root, out, ["a"])
    with_network(root)
    for classes in ([], ["a", "A"], ["background"]):
        with pytest.raises(ValueError, match="different names without the background"):
            new_class(root, out, classes)
    for odd in ("a/b", "$print(1)", "@x", ""):
        with pytest.raises(ValueError, match="letters, digits"):
            new_class(root, out, ["liver", odd])
    with pytest.raises(ValueError, match="needs the classes that it knows"):
        new_class(shrink(PUNET, tmp_path / "punet"), out, ["liver"])
    with pytest.raises(ValueError, match="end in _segmentation"):
        new_class(root, tmp_path / "new_classification", ["a"])
    with pytest.raises(FileNotFoundError, match="no weights"):
        new_class(root, out, ["a"], tmp_path / "none.pt")
    torch.save({"something.else": torch.zeros(2)}, root / "models" / "model.pt")
    with pytest.raises(ValueError, match="no tensor that fits"):
        new_class(root, out, ["a"])
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").touch()
    with_network_again = BundleFolder(root).parser("inference").get_parsed_content("network_def").state_dict()
    torch.save(with_network_again, root / "models" / "model.pt")
    with pytest.raises(FileExistsError):
        new_class(root, out, ["a"])
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_the_metadata_tells_of_the_new_classes(tmp_path: Path) -> None:
    root = shrink(CLASSIFIER, tmp_path / "source")
    with_network(root)
    made = new_class(root, tmp_path / "skin_classification", ["Mole", "melanoma"])
    metadata = BundleFolder(made.path).metadata
    pred = metadata["network_data_format"]["outputs"]["pred"]
    assert pred["channel_def"] == {"0": "mole", "1": "melanoma"}
    assert pred["num_channels"] == 2
    assert "lora_vit_classification 0.1.1" in next(iter(metadata["changelog"].values()))
    assert "mole, melanoma" in (made.path / "docs" / "README.md").read_text(encoding="utf-8").splitlines()[2]
