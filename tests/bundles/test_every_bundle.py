"""What every bundle keeps to: files, metadata, ids, agreement among its configs, export. A new one is picked up by itself."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, load, verify_metadata, verify_net_in_out
from torch import nn

from tests.bundles.helpers import BUNDLES, REPOSITORY, RUNS, SEGMENTERS, Bundle, Trained, named, parsed, state_in
from tests.conftest import shake_statistics

SCHEMA = REPOSITORY / "tests" / "schemas" / "meta_schema_20240725.json"
SCHEMA_MD5 = "06954cad2cc5d3784e72077ac76f0fc8"
CONFIGS = sorted((REPOSITORY / "bundles").glob("*/configs/*.json"))
OVERRIDES = [path for path in CONFIGS if path.stem == "evaluate" or path.stem.startswith("multi_gpu")]


def items(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in a config, however deep."""
    pairs = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in pairs:
        yield str(key), value
        yield from items(value)


def networks(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """The configs that describe a network, by name."""
    configs = {name: bundle.config(name) for name in bundle.settings}
    return {name: config for name, config in configs.items() if "network_def" in config}


def test_every_bundle_of_the_repository_is_tested() -> None:
    assert {bundle.name for bundle in BUNDLES} == {path.name for path in (REPOSITORY / "bundles").iterdir()}


# Files


@pytest.mark.parametrize(
    "file",
    [
        "LICENSE",
        "configs/metadata.json",
        "configs/train.json",
        "configs/inference.json",
        "configs/evaluate.json",
        "configs/multi_gpu_train.json",
        "configs/logging.conf",
        "docs/README.md",
    ],
)
def test_bundle_has_the_files_that_monai_looks_for(file: str, each: Bundle) -> None:
    assert (each.path / file).is_file()


def test_bundle_holds_no_python(each: Bundle) -> None:
    assert not list(each.path.rglob("*.py"))
    assert not (each.path / "scripts").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=named)
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


@pytest.mark.parametrize("path", CONFIGS, ids=named)
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


@pytest.mark.parametrize("path", OVERRIDES, ids=named)
def test_override_config_is_short_and_repeats_nothing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    overridden = "pretrain" if "pretrain" in path.stem else "train"
    base = ConfigParser(json.loads(path.with_stem(overridden).read_text(encoding="utf-8")))
    assert not [key for key, value in json.loads(text).items() if key in base and base[key] == value]


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_checkpoint_loaders_say_where_to_load_to(path: Path) -> None:
    contents = json.loads(path.read_text(encoding="utf-8"))
    places = [
        value["map_location"]
        for _, value in items(contents)
        if isinstance(value, dict) and value.get("_target_", "").endswith(("CheckpointLoader", "ResumableTraining"))
    ]
    assert set(places) <= {"@device"}
    assert bool(places) == (path.stem in ("train", "pretrain"))


def test_readme_names_only_ids_that_exist(each: Bundle) -> None:
    rows: list[str] = []
    inside = False
    for line in (each.path / "docs" / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        inside = line.startswith("|") and (inside or cells[0].lower() == "id")
        if inside:
            rows.append(cells[0])
    names = {name for row in rows for name in re.findall(r"`([A-Za-z_]\w*)`", row)}
    assert names, "docs/README.md has no table of ids"
    assert names <= {key for config in each.settings for key in each.config(config)}


# Metadata


def test_metadata_fits_the_schema(each: Bundle, tmp_path: Path) -> None:
    bundle = each.copy(tmp_path)
    (bundle / "eval").mkdir()
    schema = Path(shutil.copy(SCHEMA, bundle / "eval" / "schema.json"))
    verify_metadata(str(bundle / "configs" / "metadata.json"), str(schema), hash_val=SCHEMA_MD5)


def test_metadata_says_all_that_users_need(each: Bundle) -> None:
    metadata = each.config("metadata")
    assert Path(metadata["schema"]).name == SCHEMA.name
    wanted = "name changelog intended_use data_source data_type image_classes label_classes pred_classes references"
    for key in wanted.split():
        assert metadata[key], key
    assert isinstance(metadata["eval_metrics"], dict)
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["version"])
    assert next(iter(metadata["changelog"])) == metadata["version"]
    assert "optional_packages_version" not in metadata


def test_metadata_describes_input_and_output(each: Bundle) -> None:
    metadata = each.config("metadata")
    formats = metadata["network_data_format"]
    assert list(formats["inputs"]) == ["image"]
    assert list(formats["outputs"]) == ["pred"]
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    assert image["value_range"] == ([-1, 1] if each in SEGMENTERS else [-3, 3])
    assert list(pred["channel_def"]) == [str(k) for k in range(pred["num_channels"])]
    background = ["background"] if each in SEGMENTERS else []
    assert list(pred["channel_def"].values()) == [*background, *each.config("inference")["class_names"]]
    assert "*" not in image["spatial_shape"]


def test_pinned_versions_are_those_of_this_environment(each: Bundle) -> None:
    metadata = each.config("metadata")
    if sys.version_info < (3, 11):
        pytest.skip("the pins are those of Python 3.11 and later")
    pins = {name: metadata[f"{key}_version"] for name, key in (("monai", "monai"), ("torch", "pytorch"))}
    pins["numpy"] = metadata["numpy_version"]
    required = metadata["required_packages_version"]
    assert not required.keys() & pins.keys()
    assert "monai-petl" in required
    for name, version in {**pins, **required}.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), name
        assert importlib.metadata.version(name).split("+")[0] == version, name


# Ids and agreement among the configs


@pytest.mark.parametrize(
    ("each", "config"), [run for run in RUNS if run[1] != "inference"], ids=named, indirect=["each"]
)
def test_property_list_of_training_is_complete(
    each: Bundle,
    config: str,
    trained: Trained,
    weights: dict[str, str],
    data_of: Callable[[Bundle], Path],
    tmp_path: Path,
) -> None:
    flow = each.workflow(config, trained.bundle, data_of(each), output_dir=str(tmp_path), **weights)
    flow.initialize()
    assert flow.check_properties() == []


def test_property_list_of_inference_is_complete(
    each: Bundle, tmp_path: Path, data_of: Callable[[Bundle], Path]
) -> None:
    for folder in (tmp_path / "no_data", data_of(each)):
        flow = each.workflow("inference", tmp_path, folder)
        flow.initialize()
        assert flow.check_properties() == []


def test_configs_agree_on_network_and_preprocessing(each: Bundle) -> None:
    configs = networks(each)
    first = configs["inference"]
    used = {value[1:] for _, value in items(first["network_def"]) if isinstance(value, str) and value.startswith("@")}
    used |= {"network_def", "requirements", "device", "amp", "intensity_window"}
    used |= {"patch_size", "overlap", "spacing", "normalisation"} if each in SEGMENTERS else {"image_mean", "image_std"}
    used |= {"pad_value"} & first.keys()
    for name in used - {"class_names"}:
        assert [without_supervision(config[name]) for config in configs.values()] == [first[name]] * len(configs), name


def without_supervision(value: Any) -> Any:
    """A network's definition without the one argument that matters in training alone."""
    if isinstance(value, dict):
        return {key: without_supervision(part) for key, part in value.items() if key != "deep_supervision"}
    return value


def test_images_are_prepared_alike_in_training_and_inference(each: Bundle) -> None:
    reference = steps_of_image(each.config("inference")["preprocessing"]["transforms"])
    for name in networks(each).keys() - {"inference"}:
        flow = ConfigParser(each.config(name))
        flow.resolve_macro_and_relative_ids()
        for section in ("train", "validate"):
            steps = flow[f"{section}::deterministic_transforms"] + flow[section].get("side_transforms", [])
            assert steps_of_image(steps) == reference


def steps_of_image(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What changes the image; copies of it and features stored of it do not."""
    beside = ("CopyItemsd", "LoadFeaturesd")
    return [image_part(s) for s in steps if "image" in s["keys"] and not s["_target_"].endswith(beside)]


def image_part(step: dict[str, Any]) -> dict[str, Any]:
    """A dictionary transform reduced to what it does to the image."""
    if step["keys"] == "image":
        return step
    index = step["keys"].index("image")
    many = len(step["keys"])
    return {
        key: value[index] if isinstance(value, list) and len(value) == many else value for key, value in step.items()
    }


@pytest.mark.parametrize("each", SEGMENTERS, ids=named, indirect=True)
@pytest.mark.parametrize("normalisation", ["window", "percentile", "zscore"])
def test_validation_and_inference_see_the_same_voxels(
    each: Bundle, normalisation: str, tmp_path: Path, data: Path
) -> None:
    images = []
    for name, section in (("train", "validate::preprocessing"), ("inference", "preprocessing")):
        flow = each.workflow(name, tmp_path, data, normalisation=normalisation, spacing=[9.0, 7.0, 10.0])
        case = parsed(flow, "validate::datalist" if name == "train" else "test_cases")[0]
        source = sorted((data / "imagesTr").iterdir())[0]
        label = data / "labelsTr" / source.name
        images.append(parsed(flow, section)({**case, "image": str(source), "label": str(label)})["image"])
    assert torch.equal(*images)
    low, high = images[0].aminmax()
    assert (-1.0 <= low < high <= 1.0) or normalisation == "zscore"


# Volumes smaller than the patch


@pytest.mark.parametrize("path", [path for path in CONFIGS if "segmentation" in path.parts[-3]], ids=named)
def test_windows_and_slabs_beyond_the_volume_hold_the_same_intensity(path: Path) -> None:
    contents = json.loads(path.read_text(encoding="utf-8"))
    components = [value for _, value in items(contents) if isinstance(value, dict) and "_target_" in value]
    windows = [c for c in components if c["_target_"].endswith(("SlidingWindowInferer", "CenterSliceInferer"))]
    pads = [c for c in components if c["_target_"] == "SpatialPadd" and "image" in c["keys"]]
    outside = {c.get("cval", c.get("padding_mode")) for c in windows} | {c.get("value", c.get("mode")) for c in pads}
    assert outside <= {"@pad_value"} or outside <= {"replicate", "edge"}  # two words for the voxels of the border
    assert bool(windows) == (path.stem in ("train", "pretrain", "inference"))


# Network


def test_network_input_and_output_fit_the_metadata(each: Bundle) -> None:
    configs = each.path / "configs"
    files = {"config_file": str(configs / "inference.json"), "meta_file": str(configs / "metadata.json")}
    verify_net_in_out("network_def", bundle_root=str(each.path), **files)


def test_scores_have_the_documented_channels_and_the_size_of_the_metadata(each: Bundle) -> None:
    formats = each.config("metadata")["network_data_format"]
    sizes = [eval(str(n), {"n": 2}) for n in formats["inputs"]["image"]["spatial_shape"]]
    expected = [eval(str(n), {"n": 2}) for n in formats["outputs"]["pred"]["spatial_shape"]]
    network = ConfigParser(each.config("inference")).get_parsed_content("network_def").eval()
    with torch.no_grad():
        out = network(torch.rand(1, formats["inputs"]["image"]["num_channels"], *sizes))
    assert list(out.shape) == [1, len(formats["outputs"]["pred"]["channel_def"]), *expected]


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_network_loads_by_the_bundles_name_without_data(each: Bundle, tmp_path: Path) -> None:
    bundle = each.copy(tmp_path)
    for config in ("train", "inference"):
        written = each.config(config)
        small = {key: value for key, value in each.settings[config].items() if key in written}
        (bundle / "configs" / f"{config}.json").write_text(json.dumps({**written, **small}), encoding="utf-8")
    (bundle / "models").mkdir()
    saved = parsed(each.workflow("train", bundle, tmp_path / "no_data"), "network_def")
    torch.save(saved.state_dict(), bundle / "models" / "model.pt")
    network = load(each.name, bundle_dir=str(tmp_path), workflow_type="train", device="cpu")
    assert type(network) is type(saved)
    state = network.state_dict()
    assert list(state) == list(saved.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.state_dict().items())


def test_model_file_is_a_flat_state_dict_of_the_network(trained: Trained) -> None:
    state = state_in(trained.model)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert list(state) == list(parsed(trained.workflow, "network_def").state_dict())


# Export


@pytest.fixture
def exported(each: Bundle, tmp_path: Path) -> tuple[nn.Module, Path]:
    """A small network of the bundle's default classes, and its weights in a file."""
    config = ConfigParser(each.config("inference"))
    config.update(each.shallow)
    network = shake_statistics(config.get_parsed_content("network_def")).eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    return network, tmp_path / "model.pt"


def export(each: Bundle, weights: Path, path: Path, **options: Any) -> None:
    configs = each.path / "configs"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ckpt_export(
            "network_def",
            str(path),
            str(weights),
            str(configs / "metadata.json"),
            str(configs / "inference.json"),
            **options,
            **each.shallow,
        )


@pytest.mark.slow
@torch.no_grad()
def test_scripted_export_works_where_the_card_says_so(
    each: Bundle, exported: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    network, weights = exported
    card = (each.path / "docs" / "README.md").read_text(encoding="utf-8")
    (works,) = re.findall(r"^\| TorchScript, scripted \| (yes|no) \|", card, re.MULTILINE)
    if works == "no":
        with pytest.raises(Exception):  # noqa: B017, PT011 (the compiler has several)
            export(each, weights, tmp_path / "model.ts")
        assert not (tmp_path / "model.ts").exists()
        return
    export(each, weights, tmp_path / "model.ts")
    image = torch.rand(3, *each.input_shape[1:])
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(image), network(image), atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_traced_export_equals_the_network_for_any_batch(
    each: Bundle, exported: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    network, weights = exported
    export(each, weights, tmp_path / "model.ts", use_trace=True, input_shape=list(each.input_shape))
    again = torch.jit.load(tmp_path / "model.ts")
    for batch in (1, 3):
        image = torch.rand(batch, *each.input_shape[1:])
        torch.testing.assert_close(again(image), network(image), atol=1e-4, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_exported_program_equals_the_network_for_any_batch(
    each: Bundle, exported: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    network, _ = exported
    batch = torch.export.Dim("batch", min=1, max=64)
    example = torch.rand(2, *each.input_shape[1:])
    program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 3):
        image = torch.rand(count, *each.input_shape[1:])
        torch.testing.assert_close(again(image), network(image), atol=1e-4, rtol=0)
