"""The bundle as it lies in the repository: files, metadata, ids, agreement among its configs, export."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, load, verify_metadata, verify_net_in_out

from monai_petl.networks import PUNet
from tests.bundles.helpers import (
    BUNDLE,
    NAME,
    NETWORK,
    REPOSITORY,
    Trained,
    config_files,
    copy_bundle,
    parsed,
    state_in,
    workflow,
)
from tests.conftest import shake_statistics

SCHEMA = REPOSITORY / "tests" / "schemas" / "meta_schema_20240725.json"
SCHEMA_MD5 = "06954cad2cc5d3784e72077ac76f0fc8"
CONFIGS = sorted((BUNDLE / "configs").glob("*.json"))
OVERRIDES = ("evaluate", "multi_gpu_train", "multi_gpu_pretrain")
RUNNABLE = ("pretrain", "train", "evaluate", "inference")


def raw(name: str) -> dict[str, Any]:
    return json.loads((BUNDLE / "configs" / f"{name}.json").read_text(encoding="utf-8"))


METADATA = raw("metadata")


def items(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in a config, however deep."""
    pairs = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in pairs:
        yield str(key), value
        yield from items(value)


# Files


@pytest.mark.parametrize(
    "file",
    [
        "LICENSE",
        "configs/metadata.json",
        "configs/pretrain.json",
        "configs/train.json",
        "configs/inference.json",
        "configs/evaluate.json",
        "configs/multi_gpu_train.json",
        "configs/multi_gpu_pretrain.json",
        "configs/logging.conf",
    ],
)
def test_bundle_has_the_files_that_monai_looks_for(file: str) -> None:
    assert (BUNDLE / file).is_file()


def test_bundle_holds_no_python() -> None:
    assert not list(BUNDLE.rglob("*.py"))
    assert not (BUNDLE / "scripts").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_json_is_in_the_model_zoos_form(path: Path) -> None:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), f"a key stands twice: {[key for key, _ in pairs]}"
        return dict(pairs)

    text = path.read_text(encoding="utf-8")
    contents = json.loads(text, object_pairs_hook=no_duplicates)
    assert text == json.dumps(contents, indent=4, ensure_ascii=False) + "\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ConfigParser.load_config_file(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_has_nothing_that_fails_on_another_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|Users|root|tmp|mnt)/|[A-Z]:\\\\", text)
    assert "scripts." not in text
    assert not re.search(r"cuda:\d", text)
    for key, value in items(json.loads(text)):
        assert not key.startswith("~")
        assert "#" not in key
        assert not (isinstance(value, str) and value.startswith("/"))


def test_targets_come_from_monai_torch_ignite_or_this_package() -> None:
    for path in CONFIGS:
        for key, value in items(json.loads(path.read_text(encoding="utf-8"))):
            if key == "_target_" and "." in value:
                assert value.split(".")[0] in {"monai_petl", "monai", "torch", "ignite"}, value


@pytest.mark.parametrize("name", OVERRIDES)
def test_override_config_is_short_and_repeats_nothing(name: str) -> None:
    assert len((BUNDLE / "configs" / f"{name}.json").read_text(encoding="utf-8").splitlines()) <= 60
    base = ConfigParser(raw("pretrain" if "pretrain" in name else "train"))
    same = [key for key, value in raw(name).items() if key in base and base[key] == value]
    assert not same


def test_checkpoint_loaders_say_where_to_load_to() -> None:
    loaders = 0
    for path in CONFIGS:
        for _, value in items(json.loads(path.read_text(encoding="utf-8"))):
            if isinstance(value, dict) and value.get("_target_", "").endswith(
                ("CheckpointLoader", "ResumableTraining")
            ):
                assert value["map_location"] == "@device"
                loaders += 1
    assert loaders >= 2


def test_readme_names_only_ids_that_exist() -> None:
    readme = BUNDLE / "docs" / "README.md"
    if not readme.is_file():
        pytest.skip("the bundle has no docs/README.md")
    rows: list[str] = []
    inside = False
    for line in readme.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        inside = line.startswith("|") and (inside or cells[0].lower() == "id")
        if inside:
            rows.append(cells[0])
    names = {name for row in rows for name in re.findall(r"`([A-Za-z_]\w*)`", row)}
    assert names, "docs/README.md has no table of ids"
    known = {key for name in RUNNABLE for key in raw(name)}
    assert names <= known


# Metadata


def test_metadata_fits_the_schema(bundle: Path) -> None:
    (bundle / "eval").mkdir()
    schema = Path(shutil.copy(SCHEMA, bundle / "eval" / "schema.json"))
    verify_metadata(str(bundle / "configs" / "metadata.json"), str(schema), hash_val=SCHEMA_MD5)


def test_metadata_says_all_that_users_need() -> None:
    assert Path(METADATA["schema"]).name == SCHEMA.name
    wanted = "name changelog intended_use data_source data_type image_classes label_classes pred_classes references"
    for key in wanted.split():
        assert METADATA[key], key
    assert isinstance(METADATA["eval_metrics"], dict)
    assert re.fullmatch(r"\d+\.\d+\.\d+", METADATA["version"])
    assert next(iter(METADATA["changelog"])) == METADATA["version"]
    assert "optional_packages_version" not in METADATA


def test_metadata_describes_input_and_output() -> None:
    formats = METADATA["network_data_format"]
    assert list(formats["inputs"]) == ["image"]
    assert list(formats["outputs"]) == ["pred"]
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    assert image["value_range"] == [-1, 1]
    assert list(pred["channel_def"]) == [str(k) for k in range(pred["num_channels"])]
    assert list(pred["channel_def"].values()) == ["background", *raw("inference")["class_names"]]
    assert "*" not in image["spatial_shape"]


def test_pinned_versions_are_those_of_this_environment() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("the pins are those of Python 3.11 and later")
    pins = {name: METADATA[f"{key}_version"] for name, key in (("monai", "monai"), ("torch", "pytorch"))}
    pins["numpy"] = METADATA["numpy_version"]
    required = METADATA["required_packages_version"]
    assert not required.keys() & pins.keys()
    assert "monai-petl" in required
    for name, version in {**pins, **required}.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), name
        assert importlib.metadata.version(name).split("+")[0] == version, name


# Ids and agreement among the configs


@pytest.mark.parametrize("name", ["pretrain", "train", "evaluate"])
def test_property_list_of_training_is_complete(name: str, tuned: Trained, data: Path, tmp_path: Path) -> None:
    flow = workflow(name, tuned.bundle, data, output_dir=str(tmp_path))
    flow.initialize()
    assert flow.check_properties() == []


def test_property_list_of_inference_is_complete(bundle: Path, tmp_path: Path, data: Path) -> None:
    for folder in (tmp_path / "no_data", data):
        flow = workflow("inference", bundle, folder)
        flow.initialize()
        assert flow.check_properties() == []


def test_configs_agree_on_network_and_preprocessing() -> None:
    configs = [raw(name) for name in ("pretrain", "train", "inference")]
    shared = set(configs[0]["network_def"].values()) | {"@spacing", "@normalisation", "@intensity_window"}
    names = {value[1:] for value in shared if isinstance(value, str) and value.startswith("@")} - {"class_names"}
    for name in ("network_def", "requirements", "device", "amp", "patch_size", "overlap", *names):
        assert configs[0][name] == configs[1][name] == configs[2][name], name


def test_images_are_prepared_alike_in_training_and_inference() -> None:
    reference = [image_part(step) for step in raw("inference")["preprocessing"]["transforms"]]
    for name in ("pretrain", "train"):
        flow = ConfigParser(raw(name))
        flow.resolve_macro_and_relative_ids()
        for section in ("train", "validate"):
            steps = flow[f"{section}::deterministic_transforms"]
            assert [image_part(step) for step in steps if "image" in step["keys"]] == reference


def image_part(step: dict[str, Any]) -> dict[str, Any]:
    """A dictionary transform reduced to what it does to the image."""
    if step["keys"] == "image":
        return step
    index = step["keys"].index("image")
    many = len(step["keys"])
    return {
        key: value[index] if isinstance(value, list) and len(value) == many else value for key, value in step.items()
    }


@pytest.mark.parametrize("normalisation", ["window", "percentile", "zscore"])
def test_validation_and_inference_see_the_same_voxels(normalisation: str, bundle: Path, data: Path) -> None:
    images = []
    for name, section in (("train", "validate::preprocessing"), ("inference", "preprocessing")):
        flow = workflow(name, bundle, data, normalisation=normalisation, spacing=[9.0, 7.0, 10.0])
        case = parsed(flow, "validate::datalist" if name == "train" else "test_cases")[0]
        source = sorted((data / "imagesTr").iterdir())[0]
        label = data / "labelsTr" / source.name
        images.append(parsed(flow, section)({**case, "image": str(source), "label": str(label)})["image"])
    assert torch.equal(*images)
    low, high = images[0].aminmax()
    assert (-1.0 <= low < high <= 1.0) or normalisation == "zscore"


# Network


def test_network_input_and_output_fit_the_metadata() -> None:
    bundle = {"config_file": str(BUNDLE / "configs/inference.json"), "meta_file": str(BUNDLE / "configs/metadata.json")}
    verify_net_in_out("network_def", bundle_root=str(BUNDLE), **bundle)


def test_default_network_has_the_documented_size_and_keeps_the_size_of_the_image() -> None:
    flow = ConfigParser(raw("inference"))
    network = flow.get_parsed_content("network_def").eval()
    assert sum(p.numel() for p in network.body.parameters()) == 6_758_304
    assert sum(p.numel() for p in network.prompts["kidney"].parameters()) == 57_344
    with torch.no_grad():
        out = network(torch.rand(1, 1, 48, 32, 1))
    channels = METADATA["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert out.shape == (1, len(channels), 48, 32, 1)


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_network_loads_by_the_bundles_name_without_data(tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path)
    (bundle / "models").mkdir()
    classes = raw("inference")["class_names"]
    saved = PUNet(classes=classes)
    torch.save(saved.state_dict(), bundle / "models" / "model.pt")
    network = load(NAME, bundle_dir=str(tmp_path), workflow_type="train", device="cpu")
    assert isinstance(network, PUNet)
    assert network.classes == classes
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in network.state_dict().items())


# Export

SHALLOW = {**NETWORK, "channels": [8, 8, 16]}  # tracing takes long for each level


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[PUNet, Path]:
    """A small network of the bundle's default classes, and its weights in a file."""
    torch.manual_seed(0)
    network = shake_statistics(PUNet(classes=raw("inference")["class_names"], **SHALLOW)).eval()
    path = tmp_path_factory.mktemp("export") / "model.pt"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.slow
@torch.no_grad()
def test_traced_export_equals_the_network_for_any_batch(exported: tuple[PUNet, Path], tmp_path: Path) -> None:
    network, weights = exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ckpt_export(
            "network_def",
            str(tmp_path / "model.ts"),
            str(weights),
            str(BUNDLE / "configs" / "metadata.json"),
            config_files(BUNDLE, "inference")[0],
            use_trace=True,
            input_shape=[1, 1, 32, 32, 1],
            **SHALLOW,
        )
    again = torch.jit.load(tmp_path / "model.ts")
    for batch in (1, 3):
        image = torch.rand(batch, 1, 32, 32, 1)
        torch.testing.assert_close(again(image), network(image), atol=1e-4, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_exported_program_equals_the_network_for_any_batch(exported: tuple[PUNet, Path], tmp_path: Path) -> None:
    network, _ = exported
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (torch.rand(2, 1, 32, 32, 1),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 3):
        image = torch.rand(count, 1, 32, 32, 1)
        torch.testing.assert_close(again(image), network(image), atol=1e-4, rtol=0)


def test_model_file_is_a_flat_state_dict_of_all_classes(pretrained: Trained, tuned: Trained) -> None:
    for trained in (pretrained, tuned):
        state = state_in(trained.model)
        network = parsed(trained.workflow, "network_def")
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        assert list(state) == list(network.state_dict())
    assert parsed(pretrained.workflow, "network_def").classes == ["liver", "spleen"]
    assert parsed(tuned.workflow, "network_def").classes == ["liver", "spleen", "kidney"]
