"""Command line: ``python -m monai_petl VERB``."""

from __future__ import annotations

import json
import logging
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fire

__all__ = ["main"]


def summary(config: str, json: bool = False, **overrides: Any) -> None:
    """Print the parameters of a bundle's adapted network: in all, trained, frozen.

    Args:
        config: a bundle's folder (its configs/train.json is read) or a config file.
        json: print {"total", "trainable", "frozen", "fraction"} as JSON in place of a table.
        overrides: top-level ids of the config, for instance --method full.
    """
    from monai_petl.bundle import network_of_config
    from monai_petl.summary import summary as count

    counted = count(network_of_config(config, **overrides))
    _print_json(counted.to_dict()) if json else print(counted)


class Adapter:
    """Adapter files."""

    def inspect(self, file: str, json: bool = False) -> None:
        """Print what an adapter file says of itself: method, classes, backbone, size, notes.

        Args:
            file: a .safetensors file written by save_adapter.
            json: print everything, with the fingerprint of the backbone.
        """
        from monai_petl.adapters import inspect_adapter

        header = inspect_adapter(file)
        if json:
            _print_json(header)
            return
        methods = "; ".join(", ".join(f"{k}={v}" for k, v in method.items()) for method in header["methods"])
        rows = {
            "name": header["name"],
            "network": header["network"],
            "methods": methods,
            "also trained": ", ".join(header["also_train"]) or "nothing",
            "classes": ", ".join(header["class_names"]) or "not named",
            "values": f"{header['values']:,} in {len(header['shapes'])} tensors, {header['bytes']:,} bytes",
            "backbone": f"fingerprint of {len(header['fingerprint'])} frozen tensors",
            "notes": header["notes"],
            "versions": ", ".join(f"{k} {v}" for k, v in header["versions"].items()),
        }
        print("\n".join(f"{name:<14}{value}" for name, value in rows.items()))


class Data:
    """Data sets."""

    def make(self, images: str, labels: str, out: str, class_names: Any = None, **options: Any) -> None:
        """Build a Decathlon-style folder from NIfTI, NRRD, MHA or DICOM series. Options: see monai_petl.data.make_dataset.

        Args:
            images: folder of images.
            labels: folder of label maps with matching names.
            out: folder to make.
            class_names: names of the label values, "a,b,c" for 1, 2, 3 or {name: value}.
        """
        from monai_petl.data import make_dataset

        print(make_dataset(images, labels, out, class_names, **options))

    def medfmc(self, task: str, images: str, out: str | None = None, **lists: str) -> None:
        """Write labels.csv for bundles from list files of MedFMC.

        Args:
            task: chest, colon or endo.
            images: folder of the images.
            out: folder to write the table to; default that of the images.
            lists: --training FILE, --validation FILE, --test FILE.
        """
        from monai_petl.data import make_medfmc_table

        print(make_medfmc_table(task, images, lists, out))

    def medmnist(self, file: str, out: str, class_names: Any = ()) -> None:
        """Write the images of a file of MedMNIST as a folder with labels.csv, for bundles.

        Args:
            file: such as breastmnist_224.npz.
            out: folder to make.
            class_names: "a,b,c", in order.
        """
        from monai_petl.data import make_medmnist_folder

        print(make_medmnist_folder(file, out, _names(class_names)))

    def check(self, folder: str, json: bool = False) -> None:
        """Report geometry, label values, class frequencies and intensities of a data set. Ends with 1 on problems.

        Args:
            folder: the data set.
            json: print the report as JSON.
        """
        from monai_petl.data import check_dataset

        report = check_dataset(folder)
        _print_json(report.to_dict()) if json else print(report)
        if not report.ok:
            sys.exit(1)


class Bundle:
    """Bundles: check them, pack them, make one for other classes."""

    def verify(self, *bundles: str, schema: str | None = None, out: str | None = None, checks: Any = None) -> None:
        """Run every check of bundles, offline, and print what was found. Ends with 1 when one fails.

        Args:
            bundles: their folders.
            schema: file of the metadata's schema, meta_schema_20240725.json; that check is skipped without it.
            out: JSON file to write what was found to.
            checks: names of checks, "network,train"; default all.
        """
        from monai_petl.bundle import BundleFolder
        from monai_petl.bundle.verify import verify

        if not bundles:
            raise ValueError("give the folder of at least one bundle")
        folders = [BundleFolder(str(bundle)) for bundle in bundles]  # a wrong one is named before the first is checked
        if out is not None:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
        done = []
        for folder in folders:
            print(folder.name, flush=True)
            chosen = tuple(_names(checks)) if checks else None
            done.append(verify(folder.root, schema, chosen, told=lambda line: print(line, flush=True)))
        if out is not None:
            Path(out).write_text(json.dumps([found.to_dict() for found in done], indent=4) + "\n", encoding="utf-8")
        if not all(found.ok for found in done):
            sys.exit(1)

    def pack(self, bundle: str, out: str = ".", url: str | None = None, adapter: str | None = None) -> None:
        """Write <name>_v<version>.zip for the Model Zoo.

        Args:
            bundle: its folder.
            out: folder of the zip.
            url: address of a folder from which the backbone, and other files too large for the zip, can be downloaded.
            adapter: an adapter in the bundle's models, to be packed in place of the network.
        """
        from monai_petl.bundle.pack import pack

        print(pack(bundle, out, url, adapter))

    def new_class(self, bundle: str, out: str, class_names: Any, weights: str | None = None) -> None:
        """Write a copy of a bundle for other classes, with a network that serves and learns.

        Args:
            bundle: its folder.
            out: folder to write; its name ends in _segmentation or _classification like the bundle's.
            class_names: "liver,pancreas", all of them; for PUNet the last one is the new one.
            weights: the pre-trained file, as train.json takes it; default the bundle's models/model.pt.
        """
        from monai_petl.bundle.new_class import new_class

        print(new_class(bundle, out, _names(class_names), weights))


def inflate(
    source: str,
    out: str,
    network: str,
    img_size: Any = None,
    spatial_dims: int = 3,
    patch_size: Any = None,
    in_channels: int = 3,
    mode: str = "center",
    **options: Any,
) -> None:
    """Write a 2D pre-trained checkpoint as the weights of a MONAI network, and print what became of its tensors.

    Args:
        source: .safetensors or torch file, folder, or name on the Hugging Face hub (timm, torchvision, transformers).
        out: .safetensors file to write; load it by monai_petl.inflation.load_inflated.
        network: vit, swin or resnet.
        img_size: size of the images in voxels, for instance 224,224,5. A resnet needs none.
        spatial_dims: 2 or 3.
        patch_size: for instance 16,16,5. Default: the source's, a vit's as deep as the image.
        in_channels: channels of the images.
        mode: center or average: what the kernel does along depth.
        options: num_heads, grid, eps, class_key_bias, window_depth, downsample, resize_patch, ...: see vit_from_pretrained.
    """
    from monai_petl.inflation import build_from_pretrained, save_inflated

    if Path(str(out)).exists() and Path(str(source)).exists() and Path(str(out)).samefile(str(source)):
        raise ValueError(f"{out} is the source itself, which would be lost. Give another name")
    sizes = {"img_size": img_size, "spatial_dims": spatial_dims, "patch_size": patch_size, "in_channels": in_channels}
    built, report = build_from_pretrained(network, str(source), mode=mode, **sizes, **options)  # type: ignore[arg-type]
    path = save_inflated(built, str(out), {"source": str(source), "mode": mode, **sizes, **options})
    print(report)
    print(f"written to {path}")


def compare(config: str, methods: Any, **options: Any) -> None:
    """Train a bundle by several methods with equal budgets and write a report that tells which to take.

    Args:
        config: a bundle's folder, or its train.json.
        methods: such as lora,head,full; or a JSON file of {label: {id: value}}.
        options: out, seeds, shots, budget, section, devices, pictures, title, attribution: see monai_petl.compare.compare;
            and any top-level ids of the bundle, for instance --dataset_dir PATH --epochs 4.
    """
    _need_report()
    from monai_petl.compare import compare as run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the runs end too
    print(run(config, methods, **options))


def demo(**options: Any) -> None:
    """Pre-train, teach a new class from a few volumes, segment, and write a report. Options: see monai_petl.demo.demo."""
    _need_report()
    from monai_petl.demo import demo as run

    run(**options)


def _names(value: Any) -> list[str]:
    """Names that fire has read as text, as a list, or as a single number."""
    return (
        value.split(",")
        if isinstance(value, str)
        else [str(v) for v in value]
        if isinstance(value, list | tuple)
        else [str(value)]
    )


def _need_report() -> None:
    missing = [name for name in ("filelock", "jinja2", "pandas") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"this needs {' and '.join(missing)}; install the extra 'report': pip install 'monai-petl[report]', or in a "
            "checkout: python -m pip install --constraint constraints.txt --editable '.[report]'"
        )


def main() -> None:
    """Run a verb; an error that a user can mend is one sentence and exit code 1."""
    verbs = {
        "summary": summary,
        "adapter": Adapter,
        "bundle": Bundle,
        "data": Data,
        "inflate": inflate,
        "compare": compare,
        "demo": demo,
    }
    try:
        fire.Fire(verbs, name="python -m monai_petl")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it stood, if it is one that can (compare)")
    except Exception as error:
        from monai_petl.bundle import root_cause

        cause = root_cause(error)
        if not isinstance(cause, (ValueError, OSError, KeyError)):
            raise
        sys.exit(f"error: {cause.args[0] if isinstance(cause, KeyError) else cause}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=4, default=str))


if __name__ == "__main__":
    main()
