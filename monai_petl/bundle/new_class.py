"""A copy of a bundle for other classes, with a network that is ready to serve and to learn: a new organ for an annotator."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_petl.bundle.folder import BundleFolder, copy_folder
from monai_petl.data.datalist import new_dataset_folder
from monai_petl.weights.state_files import read_state_dict, save_network

__all__ = ["NewBundle", "new_class"]

VERSION = "0.1.0"


@dataclass(frozen=True)
class NewBundle:
    """A bundle that was written.

    Attributes:
        path: its folder.
        classes: in order of the channels 1, 2, ...
        kept: how many tensors of the network have the given weights.
        fresh: names of those that start from random values.
    """

    path: Path
    classes: tuple[str, ...]
    kept: int
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        some = ", ".join(self.fresh[:6]) + (f" and {len(self.fresh) - 6} more" if len(self.fresh) > 6 else "")
        return (
            f"{self.path}: {', '.join(self.classes)}; of the network {self.kept} tensors are those given, "
            f"{len(self.fresh)} start afresh{': ' if some else ''}{some}"
        )


def new_class(
    bundle: str | os.PathLike, out: str | os.PathLike, classes: Sequence[str], weights: str | os.PathLike | None = None
) -> NewBundle:
    """Write a copy of a bundle for another list of classes, with a complete ``models/model.pt`` for them.

    The copy infers at once, if badly, and learns from the first label on: in MONAI Label, or by its train.json.

    Args:
        bundle: its folder.
        out: folder to write, absent or empty; its name ends like the bundle's, in ``_segmentation`` or ``_classification``.
        classes: all classes of the copy, in order; written in lower case. For PUNet the last one is the new one.
        weights: what the bundle's train.json takes as ``pretrained_path``. Default: the bundle's ``models/model.pt``, of
            which all tensors are kept that the network of the new classes has too, but for the head: its channels are those
            of other classes.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there is no bundle, or there are no weights.
        FileExistsError: ``out`` holds files.
        ValueError: a class is named twice, oddly or like the background, PUNet gets one class only, the name of ``out``
            does not say the task, or the weights have nothing in common with the network.
    """
    folder, target = BundleFolder(bundle), Path(out)
    names = [str(name).strip().lower() for name in classes]
    if not names or len(set(names)) < len(names) or "background" in names:
        raise ValueError(f"classes must be different names without the background, got {list(classes)}")
    odd = [name for name in names if not re.fullmatch(r"[a-z0-9][a-z0-9 _.()+-]*", name)]
    if odd:
        raise ValueError(f"a class is named by letters, digits, spaces and _.()+-, got {odd[0]!r}")
    if "base_classes" in folder.config("train") and len(names) < 2:
        raise ValueError(f"{folder.name} needs the classes that it knows, and the new one last; got {names}")
    if not re.fullmatch(rf"[a-z0-9_]+_{folder.task}", target.name):
        raise ValueError(f"the new folder must be in lower case and end in _{folder.task}, got {target.name}")
    if weights is None and not folder.model.is_file():
        raise FileNotFoundError(
            f"no network at {folder.model}; give the pre-trained file as weights, as train.json takes it as pretrained_path"
        )
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"no weights at {weights}")
    with new_dataset_folder(target) as partial:
        for part in ("configs", "docs"):
            copy_folder(folder.root / part, partial / part)
        shutil.copyfile(folder.root / "LICENSE", partial / "LICENSE")
        new = BundleFolder(partial)
        for name in folder.configs:
            new.write(name, _with_classes(folder.config(name), names))
        new.write("metadata", _described(folder, target.name, names))
        card = partial / "docs" / "README.md"
        card.write_text(_noted(folder, names), encoding="utf-8")
        kept, fresh = _make_model(new, folder, weights)
    return NewBundle(target, tuple(names), kept, fresh)


def _with_classes(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The config with the classes in the ids that hold them."""
    values = {"class_names": list(names), "base_classes": list(names[:-1]), "new_class": names[-1]}
    written = {key: value for key, value in values.items() if isinstance(config.get(key), type(value))}
    return {**config, **written}


def _described(folder: BundleFolder, name: str, names: Sequence[str]) -> dict[str, Any]:
    found = json.loads(json.dumps(folder.metadata))
    channels = [*(["background"] if folder.task == "segmentation" else []), *names]
    pred = found["network_data_format"]["outputs"]["pred"]
    pred |= {"num_channels": len(channels), "channel_def": {str(k): channel for k, channel in enumerate(channels)}}
    source = f"{folder.name} {found['version']}"
    return {
        **found,
        "version": VERSION,
        "changelog": {VERSION: f"made from {source} for {', '.join(names)}"},
        "name": f"{name}: {found['name']}",
        "pred_classes": f"{len(channels)} channels: scores of {', '.join(channels)}",
        "eval_metrics": {},
    }


def _noted(folder: BundleFolder, names: Sequence[str]) -> str:
    """The model card with a line below its title: whose copy it is, and that its figures are the original's."""
    title, _, rest = folder.card().partition("\n")
    note = f"A copy of `{folder.name}` {folder.metadata['version']} for the classes {', '.join(names)}."
    return f"{title}\n\n{note} Figures and default classes below are those of the original.\n{rest}"


def _make_model(new: BundleFolder, old: BundleFolder, weights: str | os.PathLike | None) -> tuple[int, tuple[str, ...]]:
    """Write the new model.pt; how many of its tensors are those given, and the names of the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if weights is not None:
            before = new.parser("train", small=False).get_parsed_content("network_def").state_dict()
            untouched = {name: tensor.clone() for name, tensor in before.items()}
            torch.manual_seed(0)
            parser = new.parser("train", small=False, pretrained_path=str(Path(weights).resolve()))
            network = parser.get_parsed_content("adapted_network")
            now = network.state_dict()
            fresh = [n for n, t in now.items() if n not in untouched or torch.equal(t, untouched[n])]
        else:
            network = new.parser("inference", small=False).get_parsed_content("network_def")
            state: Mapping[str, Tensor] = read_state_dict(old.model, "")
            own = network.state_dict()
            of_classes = set() if old.class_names == new.class_names else _sized_by_classes(new, own)
            given = {n: t for n, t in state.items() if n in own and t.shape == own[n].shape and n not in of_classes}
            network.load_state_dict(given, strict=False)
            fresh = [n for n in own if n not in given]
    total = len(network.state_dict())
    if len(fresh) == total:
        raise ValueError(
            f"{weights or old.model} has no tensor that fits the network of {new.root}; was it trained here?"
        )
    save_network(network, new.model)
    return total - len(fresh), tuple(fresh)


def _sized_by_classes(bundle: BundleFolder, own: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that have another shape with one class more: the head, which must not go on for other classes."""
    more = [*bundle.class_names, "one more"]
    wider = bundle.parser("inference", small=False, class_names=more).get_parsed_content("network_def").state_dict()
    return {name for name, tensor in own.items() if name in wider and wider[name].shape != tensor.shape}
