"""What the files of a bundle have to keep to, read without running anything: the rules of the Model Zoo and of MONAI Label."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pickle
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser, verify_metadata
from torch import Tensor

from monai_petl.bundle.folder import BundleFolder, items_of
from monai_petl.files.torch_files import read_torch

__all__ = ["FILE_CHECKS", "LARGEST", "CheckError", "SkippedError", "check_schema", "large_files_of"]

FILES = (
    "LICENSE",
    "configs/metadata.json",
    "configs/train.json",
    "configs/inference.json",
    "configs/evaluate.json",
    "configs/multi_gpu_train.json",
    "configs/logging.conf",
    "docs/README.md",
)
LARGEST = 25 * 2**20  # bytes of a file in the Model Zoo's repository
SCHEMA = "meta_schema_20240725.json"
SCHEMA_MD5 = "06954cad2cc5d3784e72077ac76f0fc8"
REQUIRED = ("bundle_root", "device", "dataset_dir", "network_def", "initialize", "run")
REQUIRED_OF = {
    "train": ("train::trainer", "train::trainer::max_epochs", "train::dataset", "train::inferer", "network"),
    "inference": ("dataset", "evaluator", "inferer", "preprocessing", "postprocessing"),
}
REFERENCES = {  # ids that MONAI reads through others, which have to refer to them
    "train": {
        "train::dataset::transform": "@train::preprocessing",
        "train::trainer::postprocessing": "@train::postprocessing",
        "train::trainer::train_handlers": "@train::handlers",
        "validate::evaluator::val_handlers": "@validate::handlers",
        "validate::dataloader::dataset": "@validate::dataset",
    },
    "inference": {
        "dataset::transform": "@preprocessing",
        "evaluator::postprocessing": "@postprocessing",
        "evaluator::val_handlers": "@handlers",
    },
}
TRAINING_ONLY = ("deep_supervision", "_requires_")


class CheckError(Exception):
    """A check that a bundle does not pass; the message says what is wrong and where."""


class SkippedError(Exception):
    """A check that cannot be made here; the message says why."""


def check_files(bundle: BundleFolder) -> None:
    """All files are there that MONAI, the Model Zoo and MONAI Label look for, and no code."""
    missing = [name for name in FILES if not (bundle.root / name).is_file()]
    _refuse(missing, "missing")
    code = [path.relative_to(bundle.root).as_posix() for path in bundle.root.rglob("*.py")]
    _refuse(code + ["scripts/"] * (bundle.root / "scripts").exists(), "code belongs into an installed package")
    if not bundle.name.endswith(("_segmentation", "_classification")) or not re.fullmatch(r"[a-z0-9_]+", bundle.name):
        raise CheckError(
            f"the name {bundle.name} is not in lower case or does not end in _segmentation or _classification"
        )


def check_form(bundle: BundleFolder) -> None:
    """JSON in the Model Zoo's form: four spaces, no key twice, a newline at the end."""
    wrong = []
    for path in sorted((bundle.root / "configs").glob("*.json")):
        text = path.read_text(encoding="utf-8")
        twice: list[str] = []

        def pairs(found: list[tuple[str, Any]], twice: list[str] = twice) -> dict[str, Any]:
            twice += [key for key, _ in found if sum(key == other for other, _ in found) > 1]
            return dict(found)

        contents = json.loads(text, object_pairs_hook=pairs)
        wrong += [f"{path.name} ({twice[0]} stands twice)"] if twice else []
        wrong += [] if text == json.dumps(contents, indent=4, ensure_ascii=False) + "\n" else [f"{path.name} (form)"]
    _refuse(wrong, "not 4-space JSON with a final newline")


def check_schema(bundle: BundleFolder, schema: Path | None) -> None:
    """The metadata fits the schema, from a file, without a network."""
    if schema is None:
        raise SkippedError(f"needs the schema's file, --schema {SCHEMA}")
    md5 = hashlib.md5(schema.read_bytes()).hexdigest()
    if md5 != SCHEMA_MD5:
        raise CheckError(f"{schema} is not {SCHEMA}: its md5 is {md5}")
    if find_spec("jsonschema") is None:
        raise SkippedError("needs the package jsonschema")
    try:
        verify_metadata(str(bundle.root / "configs" / "metadata.json"), str(schema), hash_val=SCHEMA_MD5)
    except Exception as error:
        raise CheckError(str(error).splitlines()[0]) from error


def check_metadata(bundle: BundleFolder) -> None:
    """The metadata says all that users and programs read, and describes the network's input and output."""
    found = bundle.metadata
    wanted = "schema version changelog name intended_use data_source data_type image_classes label_classes pred_classes"
    missing = [key for key in f"{wanted} references network_data_format".split() if not found.get(key)]
    _refuse(missing + [key for key in ("eval_metrics",) if key not in found], "missing in metadata.json")
    if Path(found["schema"]).name != SCHEMA:
        raise CheckError(f"schema is {found['schema']}, not {SCHEMA}")
    if not re.fullmatch(r"\d+\.\d+\.\d+", found["version"]) or next(iter(found["changelog"])) != found["version"]:
        raise CheckError(f"version {found['version']} is not three numbers, or not the first one in changelog")
    formats = found["network_data_format"]
    if list(formats["inputs"]) != ["image"] or list(formats["outputs"]) != ["pred"]:
        raise CheckError("input and output are not called image and pred")
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    expected = [*(["background"] if bundle.task == "segmentation" else []), *bundle.class_names]
    if pred["num_channels"] != len(expected) or pred["channel_def"] != {str(k): n for k, n in enumerate(expected)}:
        raise CheckError(
            f"pred has {pred['num_channels']} channels, {list(pred['channel_def'].values())}; the classes of inference.json "
            f"make {len(expected)}, {expected}"
        )
    if [name for name in expected if name != name.lower()]:
        raise CheckError("names of channels are not in lower case, as MONAI Label makes them")
    if "*" in image["spatial_shape"]:
        raise CheckError("spatial_shape of image has a *, which the Model Zoo reads as 1")


def check_versions(bundle: BundleFolder) -> None:
    """The pins are exact versions, and those of this environment."""
    found = bundle.metadata
    if "optional_packages_version" in found:
        raise CheckError("optional_packages_version is deprecated; name all in required_packages_version")
    required = found["required_packages_version"]
    if "monai-petl" not in required or required.keys() & {"monai", "torch", "numpy"}:
        raise CheckError("required_packages_version has to name monai-petl, and not monai, torch or numpy")
    pins = {name: found[f"{key}_version"] for name, key in (("monai", "monai"), ("torch", "pytorch"))}
    pins["numpy"] = found["numpy_version"]
    inexact = [f"{name} {pin}" for name, pin in {**pins, **required}.items() if not re.fullmatch(r"\d+\.\d+\.\d+", pin)]
    _refuse(inexact, "not exact versions")
    if sys.version_info < (3, 11):
        raise SkippedError("the pins are those of Python 3.11 and later")
    stale = []
    for name, pin in {**pins, **required}.items():
        try:
            here = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            here = "nothing"
        stale += [] if here == pin else [f"{name} {pin} ({here} is installed)"]
    _refuse(stale, "stale pins")


def check_portability(bundle: BundleFolder) -> None:
    """Nothing in a config binds it to a machine, a device, a folder of scripts or a syntax that is gone."""
    wrong = []
    for path in sorted((bundle.root / "configs").glob("*.json")):
        text = path.read_text(encoding="utf-8")
        for pattern, what in (
            (r"/(home|Users|root|tmp|mnt)/|\b[A-Z]:[\\/]", "an absolute path"),
            (r"scripts\.", "a target in scripts"),
            (r"cuda:\d", "a numbered device"),
        ):
            wrong += [f"{path.name}: {what}"] if re.search(pattern, text) else []
        for key, value in items_of(json.loads(text)):
            wrong += [f"{path.name}: {key}"] if key.startswith("~") or "#" in key else []
            if isinstance(value, str) and value.startswith("/"):
                wrong.append(f"{path.name}: an absolute path at {key}")
            if isinstance(value, dict) and str(value.get("_target_", "")).endswith(
                ("CheckpointLoader", "ResumableTraining")
            ):
                wrong += (
                    [] if value.get("map_location") == "@device" else [f"{path.name}: a loader without map_location"]
                )
            if (
                key == "_target_"
                and "." in value
                and value.split(".")[0] not in ("monai", "monai_petl", "torch", "ignite")
            ):
                wrong.append(f"{path.name}: the target {value} is in no declared package")
    _refuse(wrong, "not portable")


def check_ids(bundle: BundleFolder) -> None:
    """Training and inference have the ids that MONAI and MONAI Label look for, and refer to them."""
    wrong = []
    for name, more in REQUIRED_OF.items():
        parser = ConfigParser(bundle.config(name))
        wrong += [f"{name}.json has no {key}" for key in (*REQUIRED, *more) if key not in parser]
        wrong += [
            f"{name}.json: {key} is not {value}"
            for key, value in REFERENCES[name].items()
            if value[1:] in parser and parser.get(key) != value
        ]
    _refuse(wrong, "ids")


def check_agreement(bundle: BundleFolder) -> None:
    """Training and inference describe the same network and prepare images alike."""
    inference = bundle.config("inference")
    wanted = _image_steps(inference["preprocessing"]["transforms"])
    shared = _named(inference, [inference["network_def"], wanted]) | ({"patch_size", "overlap"} & inference.keys())
    shared |= {"network_def", "device", "amp"} - {"class_names"}
    served = bundle.class_names
    trained = list(ConfigParser(bundle.config("train")).get_parsed_content("class_names"))
    if served != trained:
        raise CheckError(f"train.json has the classes {trained}, inference.json {served}: channels would be mistaken")
    for name in {"train", "pretrain"} & {*bundle.configs}:
        config = bundle.config(name)
        differ = [
            key for key in sorted(shared - {"class_names"}) if _without(config.get(key)) != _without(inference[key])
        ]
        _refuse(differ, f"different in {name}.json and inference.json")
        parser = ConfigParser(config)
        parser.resolve_macro_and_relative_ids()
        for section in ("train", "validate"):
            steps = parser[f"{section}::deterministic_transforms"] + parser[section].get("side_transforms", [])
            if _image_steps(steps) != wanted:
                raise CheckError(f"{section} of {name}.json prepares images otherwise than inference.json")


def check_overrides(bundle: BundleFolder) -> None:
    """evaluate.json and the configs for several processes hold differences alone, in at most 60 lines."""
    for name in bundle.configs:
        if name == "evaluate" or name.startswith("multi_gpu"):
            lines = (bundle.root / "configs" / f"{name}.json").read_text(encoding="utf-8").count("\n")
            base = ConfigParser(json.loads(Path(bundle.files_of(name)[0]).read_text(encoding="utf-8")))
            same = [key for key, value in bundle.config(name).items() if key in base and base[key] == value]
            if lines > 60 or same:
                raise CheckError(f"{name}.json has {lines} lines and repeats: {', '.join(same) or 'nothing'}")


def check_weights(bundle: BundleFolder) -> None:
    """At most one ``.pt`` in models, flat and read without code; hashes of large_files.yml are right; nothing else is large."""
    files = sorted((bundle.root / "models").glob("*.pt"))
    _refuse(
        [path.name for path in files if path.name != "model.pt"],
        "MONAI Label would offer or load these beside model.pt",
    )
    entries = large_files_of(bundle)
    for entry in entries:
        if not {"path", "url", "hash_val"} <= entry.keys() or entry.get("hash_type") != "sha256":
            raise CheckError(f"large_files.yml: {entry.get('path')} needs path, url, hash_val and hash_type: sha256")
        local = bundle.root / entry["path"]
        if local.is_file() and hashlib.sha256(local.read_bytes()).hexdigest() != entry["hash_val"]:
            raise CheckError(f"{entry['path']} is not the file whose hash large_files.yml has")
    tracked = [path for path in bundle.root.rglob("*") if path.is_file() and path.stat().st_size > LARGEST]
    names = [path.relative_to(bundle.root) for path in tracked]
    _refuse([name.as_posix() for name in names if name.parts[0] not in ("models", "eval", "data")], "above 25 MB")
    if bundle.model.is_file():
        try:
            state = read_torch(bundle.model)
        except pickle.UnpicklingError:  # torch's own advice is to execute what the file holds
            raise CheckError("models/model.pt cannot be read without running code. Save network.state_dict()") from None
        except Exception as error:
            raise CheckError(
                f"models/model.pt cannot be read: {(str(error) or 'it is empty').splitlines()[0]}"
            ) from error
        if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
            raise CheckError("models/model.pt is no flat state dict of tensors")


def check_card(bundle: BundleFolder) -> None:
    """The model card names files that exist and ids that are read, has commands, and says what can be exported."""
    text = bundle.card()
    rows: list[str] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        inside = line.startswith("|") and (inside or cells[0].lower() == "id")
        rows += [cells[0]] if inside else []
    names = {name for row in rows for name in re.findall(r"`([A-Za-z_]\w*)`", row)}
    known = {key for name in bundle.configs for key in bundle.config(name)}
    _refuse(sorted(names - known), "the card's tables name ids that no config has")
    if not names:
        raise CheckError("the card has no table of ids")
    written = "".join(json.dumps(bundle.config(name)) for name in bundle.configs)
    unread = [name for name in sorted(names) if not re.search(rf"[@%]{name}\b", written)]
    _refuse(unread, "the card's tables name ids that nothing reads")
    files = {name for name in re.findall(r"\bconfigs/\w+\.\w+", text) if not (bundle.root / name).is_file()}
    _refuse(sorted(files), "the card names files that are not there")
    if "python -m monai.bundle run" not in text:
        raise CheckError("the card has no command that runs the bundle")
    kinds, claims = ("TorchScript scripted", "TorchScript traced", "torch.export", "ONNX"), bundle.claims()
    missing = [kind for kind in kinds if kind not in claims]
    _refuse(missing, "the card does not say yes or no to")


FILE_CHECKS = {
    "files": check_files,
    "form of JSON": check_form,
    "metadata": check_metadata,
    "versions": check_versions,
    "portability": check_portability,
    "ids": check_ids,
    "agreement": check_agreement,
    "overrides": check_overrides,
    "weights": check_weights,
    "model card": check_card,
}


def _refuse(found: list[str], what: str) -> None:
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise CheckError(f"{what}: {', '.join(found[:5])}{more}")


def large_files_of(bundle: BundleFolder) -> list[dict[str, Any]]:
    """The entries of large_files.yml; none where there is no such file."""
    path = bundle.root / "large_files.yml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {"large_files": []}
    if not isinstance(found, dict) or not isinstance(found.get("large_files"), list):
        raise CheckError("large_files.yml has no list large_files")
    return found["large_files"]


def _without(value: Any) -> Any:
    """A network's definition without what matters in training alone."""
    if isinstance(value, dict):
        return {key: _without(part) for key, part in value.items() if key not in TRAINING_ONLY}
    return value


def _named(config: dict[str, Any], parts: Any) -> set[str]:
    """Top-level ids that these parts of a config refer to, and those that these refer to."""
    found: set[str] = set()
    texts = [value for _, value in items_of(parts) if isinstance(value, str)]
    while texts:
        for name in re.findall(r"@([A-Za-z_]\w*)", texts.pop()):
            if name in config and name not in found:
                found.add(name)
                texts += [value for _, value in items_of([config[name]]) if isinstance(value, str)]
    return found


def _image_steps(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What changes the image; copies of it and features stored of it do not."""
    beside = ("CopyItemsd", "LoadFeaturesd")
    return [_image_part(s) for s in steps if "image" in s["keys"] and not s["_target_"].endswith(beside)]


def _image_part(step: dict[str, Any]) -> dict[str, Any]:
    """A dictionary transform reduced to what it does to the image."""
    if step["keys"] == "image":
        return step
    index, many = step["keys"].index("image"), len(step["keys"])
    return {
        key: value[index] if isinstance(value, list) and len(value) == many else value for key, value in step.items()
    }
