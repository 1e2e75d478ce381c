"""Pack a bundle for the Model Zoo: a zip without the frozen backbone, which is named with its hash instead."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from monai.bundle import ConfigParser

from monai_petl.bundle.checks import FILE_CHECKS, LARGEST, CheckError, SkippedError, large_files_of
from monai_petl.bundle.errors import root_cause
from monai_petl.bundle.folder import BundleFolder
from monai_petl.files.atomic import write_text, written_whole
from monai_petl.weights.state_files import read_state_dict

__all__ = ["Packed", "pack"]

UNIT_TEST = '''"""Trains, evaluates and runs {name} on toy data; the working folder is a checkout of the Model Zoo."""

import unittest
from pathlib import Path

from monai_petl.bundle.verify import verify

CHECKS = ("train", "evaluate", "infer", "properties")


class TestBundle(unittest.TestCase):
    def test_every_workflow(self):
        found = verify(Path("models") / "{name}", checks=CHECKS)
        self.assertTrue(found.ok, str(found))


if __name__ == "__main__":
    unittest.main()
'''
DATE = (1980, 1, 1, 0, 0, 0)  # of every file in the zip, so that the same bundle gives the same bytes


@dataclass(frozen=True)
class Packed:
    """A packed bundle.

    Attributes:
        path: of the zip.
        test: of the unit test for the zoo's ``ci/unit_tests``, beside the zip.
        files: names in it, with their bytes.
        large: what large_files.yml names in place of files that are not in it.
        sha256: of the zip.
        rebuild: the command that makes ``models/model.pt`` in the unpacked folder; empty where the zip holds it.
    """

    path: Path
    test: Path
    files: dict[str, int]
    large: tuple[dict[str, str], ...]
    sha256: str
    rebuild: str

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.path.stat().st_size:,} bytes, {len(self.files)} files, sha256 {self.sha256}"]
        lines += [f"its unit test for the zoo: {self.test}"]
        if not any(name.startswith("models/") for name in (*self.files, *(entry["path"] for entry in self.large))):
            lines += ["it holds no weights and names none: models/model.pt is missing"]
        lines += [f"not in it, in large_files.yml: {entry['path']} from {entry['url']}" for entry in self.large]
        lines += [f"its models/model.pt is made by, in the unpacked folder: {self.rebuild}"] if self.rebuild else []
        return "\n".join(lines)


def pack(
    bundle: str | os.PathLike,
    out: str | os.PathLike = ".",
    url: str | None = None,
    adapter: str | os.PathLike | None = None,
    check: bool = True,
) -> Packed:
    """Write ``<name>_v<version>.zip`` as the Model Zoo takes it, and ``test_<name>.py``, the unit test that it wants beside it.

    With an adapter the zip holds that file in place of the network; the backbone that it was trained on becomes an entry of
    ``large_files.yml`` with its sha256, and one offline command puts both together again. Without one, the zip holds
    ``models/model.pt``. Files above 25 MB become entries as well; entries that the bundle has already stay.

    Args:
        bundle: its folder.
        out: folder of the zip, outside of the bundle.
        url: address of a folder from which the large files can be downloaded, by their names.
        adapter: a file below the bundle's ``models``.
        check: make the checks of the bundle's files first.

    Returns:
        What was packed.

    Raises:
        FileNotFoundError: there is no bundle, adapter or backbone.
        ValueError: the bundle does not pass a check, a large file has no ``url``, the bundle has no adapters of this kind,
            backbone and adapter do not make ``models/model.pt``, or ``out`` lies in the bundle.
        OSError: the zip cannot be written.
    """
    folder = BundleFolder(bundle)
    if Path(out).resolve().is_relative_to(folder.root):
        raise ValueError(f"{Path(out).resolve()} lies in the bundle, which would pack it; give another folder as out")
    if check:
        _require_sound(folder)
    chosen = {path.relative_to(folder.root).as_posix(): path for path in _own_files(folder.root)}
    entries = {entry["path"]: entry for entry in large_files_of(folder)}
    rebuild = ""
    if adapter is not None:
        held, backbone = _below(folder, Path(adapter)), _backbone(folder)
        _require_same(folder, held)
        chosen[held] = folder.root / held
        entries[backbone] = _entry(folder, backbone, url)
        rebuild = f"python -m monai.bundle run rebuild --config_file configs/inference.json --adapter_path {held}"
    elif folder.model.is_file():
        chosen["models/model.pt"] = folder.model
    for name in [name for name, path in chosen.items() if path.stat().st_size > LARGEST]:
        del chosen[name]
        entries[name] = _entry(folder, name, url)
    contents = {name: path.read_bytes() for name, path in chosen.items()}
    if entries:
        contents["large_files.yml"] = yaml.safe_dump({"large_files": [*entries.values()]}, sort_keys=False).encode()
    target = Path(out) / f"{folder.name}_v{folder.metadata['version']}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target, "the bundle") as part:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in sorted(contents.items()):
                info = zipfile.ZipInfo(f"{folder.name}/{name}", DATE)
                info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(info, data)
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
    test = target.parent / f"test_{folder.name}.py"
    write_text(test, UNIT_TEST.format(name=folder.name), "the unit test")
    return Packed(target, test, {n: len(data) for n, data in contents.items()}, (*entries.values(),), digest, rebuild)


def _own_files(root: Path) -> list[Path]:
    """Licence, configs and documents, without what editors and systems leave behind.

    Raises:
        ValueError: one of them is a link to something outside of the bundle, which nobody means to publish.
    """
    found = [root / "LICENSE", *(root / "configs").glob("*.json"), *(root / "configs").glob("*.conf")]
    found += [path for path in (root / "docs").rglob("*") if not any(p[0] == "." for p in path.relative_to(root).parts)]
    outside = [path for path in found if path.exists() and not path.resolve().is_relative_to(root)]
    if outside:
        links = ", ".join(f"{path.relative_to(root)} -> {path.resolve()}" for path in outside[:3])
        raise ValueError(f"{root.name} has links that leave its folder: {links}. Copy what is meant to be published")
    return sorted(path for path in found if path.is_file())


def _require_sound(folder: BundleFolder) -> None:
    for name, act in FILE_CHECKS.items():
        try:
            act(folder)
        except SkippedError:
            continue
        except CheckError as error:
            raise ValueError(f"{folder.name} does not pass the check of its {name}: {error}") from error


def _below(folder: BundleFolder, path: Path) -> str:
    path = path if path.is_file() else folder.root / path
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path}")
    if not path.resolve().is_relative_to(folder.root / "models"):
        raise ValueError(f"{path} is not below {folder.root / 'models'}; put it there, such as to models/adapters")
    return path.resolve().relative_to(folder.root).as_posix()


def _backbone(folder: BundleFolder) -> str:
    """Where inference.json looks for the backbone, from the bundle's folder."""
    config = folder.config("inference")
    if not {"pretrained_path", "adapter_path"} <= config.keys():
        raise ValueError(f"{folder.name} keeps all that it has learnt in models/model.pt; pack it without adapter")
    path = Path(ConfigParser({**config, "bundle_root": str(folder.root)}).get_parsed_content("pretrained_path"))
    if not path.is_file():
        raise FileNotFoundError(f"no backbone at {path}; put the file there that the adapter was trained on")
    return path.relative_to(folder.root).as_posix()


def _entry(folder: BundleFolder, name: str, url: str | None) -> dict[str, str]:
    path = folder.root / name
    if not url:
        size = path.stat().st_size
        raise ValueError(f"{name} ({size:,} bytes) does not go into the zip; say where it can be downloaded, as url")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"path": name, "url": f"{url.rstrip('/')}/{path.name}", "hash_val": digest, "hash_type": "sha256"}


def _require_same(folder: BundleFolder, adapter: str) -> None:
    """Backbone and adapter fit together, and are the network that was trained, where that is there."""
    parser = ConfigParser(folder.config("inference"))
    parser["bundle_root"], parser["adapter_path"] = str(folder.root), str(folder.root / adapter)
    try:
        parser.get_parsed_content("load_weights")
    except Exception as error:
        raise ValueError(f"{adapter} does not fit the backbone: {root_cause(error)}") from error
    if not folder.model.is_file():
        return
    made = parser.get_parsed_content("network_def").state_dict()
    kept = read_state_dict(folder.model, "")
    differ = [n for n in {*made, *kept} if n not in made or n not in kept or not torch.equal(made[n], kept[n])]
    if differ:
        raise ValueError(
            f"{adapter} on the backbone is not the network in models/model.pt: {len(differ)} tensors differ, such as "
            f"{sorted(differ)[0]}. Pack the adapter of that training, or leave model.pt away"
        )
