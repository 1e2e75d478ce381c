"""A bundle's folder: its configs as they are written, and as workflows that are ready to run."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from monai_petl.files.atomic import write_text
from monai_petl.files.json_files import read_object

__all__ = ["BundleFolder", "copy_folder", "items_of"]


class BundleFolder:
    """A bundle on disk.

    Args:
        root: its folder. ``configs/small.json`` in it, if there is one, holds top-level ids that make runs short.

    Raises:
        FileNotFoundError: there is no ``configs/metadata.json`` in it.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root).expanduser().resolve()
        if not (self.root / "configs" / "metadata.json").is_file():
            raise FileNotFoundError(f"{root} is no bundle: it holds no configs/metadata.json")

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.root.name

    @property
    def task(self) -> str:
        """``segmentation`` or ``classification``, as MONAI Label tells it from the name."""
        return "segmentation" if "segmentation" in self.name or "classification" not in self.name else "classification"

    @property
    def model(self) -> Path:
        """Where the complete network lies."""
        return self.root / "models" / "model.pt"

    @cached_property
    def configs(self) -> list[str]:
        """Names of the configs that hold ids, without the metadata."""
        return sorted(p.stem for p in (self.root / "configs").glob("*.json") if p.stem not in ("metadata", "small"))

    def config(self, name: str) -> dict[str, Any]:
        """A config as it is written."""
        path = self.root / "configs" / f"{name}.json"
        return read_object(path, "Mend it, or take it from the bundle as it was published")

    def write(self, name: str, contents: Mapping[str, Any]) -> None:
        """Write a config in the Model Zoo's form."""
        text = json.dumps(contents, indent=4, ensure_ascii=False) + "\n"
        write_text(self.root / "configs" / f"{name}.json", text, "the config")

    def small_copy(self, root: Path, **more: Any) -> BundleFolder:
        """A copy as it is published, with the ids of small.json, and ``more`` where a config has them, written into it."""
        copy = BundleFolder(copy_folder(self.root, root, "models", "eval", "data"))
        for name in self.configs:
            written = self.config(name)
            ids = {key: value for key, value in {**self.sizes(name), **more}.items() if key in written}
            copy.write(name, {**written, **ids})
        return copy

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The contents of metadata.json."""
        return self.config("metadata")

    def card(self) -> str:
        """The model card."""
        return (self.root / "docs" / "README.md").read_text(encoding="utf-8")

    def files_of(self, config: str) -> list[str]:
        """The config files behind a name: overrides come behind what they override."""
        base = "pretrain" if "pretrain" in config else "train"
        own = config in ("train", "pretrain", "inference")
        return [str(self.root / "configs" / f"{name}.json") for name in ([config] if own else [base, config])]

    def sizes(self, config: str) -> dict[str, Any]:
        """Those ids of small.json that a config knows."""
        if not (self.root / "configs" / "small.json").is_file():
            return {}
        known = {name for path in self.files_of(config) for name in self.config(Path(path).stem)}
        return {name: value for name, value in self.config("small").items() if name in known}

    def workflow(self, config: str, data: str | os.PathLike, **overrides: Any) -> ConfigWorkflow:
        """A config with small sizes, as ``python -m monai.bundle run`` makes it; not initialised."""
        settings = {**self.sizes(config), "bundle_root": str(self.root), "dataset_dir": str(data), **overrides}
        kind = "infer" if config == "inference" else "train"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that configs are code
            return ConfigWorkflow(self.files_of(config), logging_file=False, workflow_type=kind, **settings)

    def run(self, config: str, data: str | os.PathLike, **overrides: Any) -> ConfigWorkflow:
        """Run a config to its end."""
        flow = self.workflow(config, data, **overrides)
        flow.initialize()
        flow.run()
        flow.finalize()
        return flow

    def parser(self, config: str, small: bool = True, **overrides: Any) -> ConfigParser:
        """A config, with small sizes unless they are not wanted, whose ids are built one by one."""
        parser = ConfigParser()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            parser.read_config(self.files_of(config))
        sizes = self.sizes(config) if small else {}
        for name, value in {**sizes, "bundle_root": str(self.root), **overrides}.items():
            parser[name] = value
        return parser

    @property
    def class_names(self) -> list[str]:
        """What the network tells apart as inference.json is written, without the background."""
        return list(ConfigParser(self.config("inference")).get_parsed_content("class_names"))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(1, C, *size) of what the network sees at once, with small sizes."""
        parser = self.parser("inference")
        size = parser.get_parsed_content("patch_size" if "patch_size" in parser.get() else "img_size")
        return (1, self.metadata["network_data_format"]["inputs"]["image"]["num_channels"], *size)

    def claims(self) -> dict[str, bool]:
        """What the model card says of exports: kind -> whether it works."""
        rows = re.findall(r"^\| *(TorchScript, \w+|`torch\.export`|ONNX) *\| *(yes|no) *\|", self.card(), re.MULTILINE)
        return {name.strip("`").replace(",", ""): answer == "yes" for name, answer in rows}


def copy_folder(source: Path, target: Path, *leave: str) -> Path:
    """A copy without these names that can be written to, also of what is read-only."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*leave), copy_function=shutil.copyfile)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    return target


def items_of(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in a config, however deep."""
    pairs = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in pairs:
        yield str(key), value
        yield from items_of(value)
