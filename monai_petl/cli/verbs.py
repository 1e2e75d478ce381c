"""The verbs of the command line, a line each, and the few functions that print what the library only returns."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_petl.cli.command import Command
from monai_petl.files.atomic import write_text

__all__ = ["VERBS"]

HERE = __name__
VERBS = {
    "summary": Command(
        f"{HERE}:summary", "Count the parameters of a bundle's adapted network: total, trainable, frozen."
    ),
    "adapter": {
        "inspect": Command(f"{HERE}:inspect", "Show method, classes, backbone, size and notes of an adapter file."),
    },
    "backbone": {
        "list": Command(
            f"{HERE}:list_backbones", "Pre-trained networks that load by their file: data, licence, where."
        ),
        "inspect": Command(f"{HERE}:inspect_backbone", "Say what a checkpoint is, and what becomes of every tensor."),
        "convert": Command(f"{HERE}:convert", "Write a checkpoint under the names of MONAI's network, in safetensors."),
    },
    "bundle": {
        "verify": Command(f"{HERE}:verify", "Run every check of bundles, offline. Exit code 1 when one fails."),
        "render": Command(f"{HERE}:render", "Write the configs of bundles from their pages and shared parts."),
        "pack": Command("monai_petl.bundle.pack:pack", "Write NAME_vVERSION.zip for the Model Zoo."),
        "new-class": Command(
            f"{HERE}:new_class", "Copy a bundle for other classes, with a network that serves and learns."
        ),
    },
    "data": {
        "make": Command(
            "monai_petl.data:make_dataset", "Build a Decathlon folder from NIfTI, NRRD, MetaImage or DICOM files."
        ),
        "check": Command(
            f"{HERE}:check", "Report what a data set holds and what is wrong with it. Exit code 1 on problems."
        ),
        "medfmc": Command(f"{HERE}:medfmc", "Write labels.csv for bundles from list files of MedFMC."),
        "medmnist": Command(
            "monai_petl.data:make_medmnist_folder", "Write the images of a MedMNIST file as a folder with labels.csv."
        ),
    },
    "inflate": Command(f"{HERE}:inflate", "Write a 2D pre-trained checkpoint as the weights of a MONAI network."),
    "compare": Command(
        "monai_petl.compare:compare", "Train a bundle by several methods and report which to take.", "report", logs=True
    ),
    "demo": Command(
        "monai_petl.demo:demo", "Pre-train, teach a class from a few volumes, segment, and write a report.", "report"
    ),
}


def summary(config: str, json: bool = False, **overrides: Any) -> Any:
    """Parameters of a bundle's adapted network.

    Args:
        config: a bundle's folder (its configs/train.json is read) or a config file.
        json: print {"total", "trainable", "frozen", "fraction"} as JSON in place of a table.
        overrides: an id of the config, for instance --method full.
    """
    from monai_petl.bundle import network_of_config
    from monai_petl.core.summary import summary as count

    counted = count(network_of_config(config, **overrides))
    return _json(counted.to_dict()) if json else counted


def inspect(file: str, json: bool = False) -> str:
    """What an adapter file says of itself.

    Args:
        file: a .safetensors file written by save_adapter.
        json: print everything, with the fingerprint of the backbone.
    """
    from monai_petl.core.adapters import inspect_adapter

    header = inspect_adapter(file)
    if json:
        return _json(header)
    methods = "; ".join(", ".join(f"{k}={v}" for k, v in method.items()) for method in header["methods"])
    rows = {
        "name": header["name"],
        "network": header["network"],
        "methods": methods,
        "also trained": ", ".join(header["also_train"]) or "nothing",
        "classes": ", ".join(header["class_names"]) or "not named",
        "values": f"{header['values']:,} in {len(header['shapes'])} tensors, {header['bytes']:,} bytes",
        "backbone": f"fingerprint of {len(header['fingerprint'])} frozen tensors",
        "checksum": "as it was saved" if header["sha256"] else "none (saved before there were checksums)",
        "notes": header["notes"],
        "versions": ", ".join(f"{k} {v}" for k, v in header["versions"].items()),
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def check(folder: str, json: bool = False) -> Any:
    """Geometry, label values, class frequencies and intensities of a data set.

    Args:
        folder: the data set.
        json: print the report as JSON.
    """
    from monai_petl.data import check_dataset

    report = check_dataset(folder)
    if json:
        print(_json(report.to_dict()))
        return None if report.ok else _Failed("")
    return report


def medfmc(
    task: str,
    images: str,
    training: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    out: str | None = None,
) -> Path:
    """A table for bundles from the lists of MedFMC.

    Args:
        task: chest, colon or endo.
        images: folder of the images.
        training: list file of the training section.
        validation: list file of the validation section.
        test: list file of the test section.
        out: folder to write the table to; default that of the images.
    """
    from monai_petl.data import make_medfmc_table

    lists = {"training": training, "validation": validation, "test": test}
    return make_medfmc_table(task, images, {name: path for name, path in lists.items() if path is not None}, out)


def verify(
    *bundles: str, schema: str | None = None, out: str | None = None, checks: Sequence[str] | None = None
) -> Any:
    """Every check of bundles, offline.

    Args:
        bundles: their folders.
        schema: file of the metadata's schema, meta_schema_20240725.json; that check is skipped without it.
        out: JSON file to write what was found to.
        checks: names of checks, such as network,train; default all.
    """
    from monai_petl.bundle import BundleFolder
    from monai_petl.bundle.verify import verify as check_bundle

    folders = [BundleFolder(bundle) for bundle in bundles]  # a wrong one is named before the first is checked
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    done = []
    for folder in folders:
        print(folder.name, flush=True)
        chosen = tuple(checks) if checks else None
        done.append(check_bundle(folder.root, schema, chosen, told=lambda line: print(line, flush=True)))
    if out is not None:
        write_text(out, _json([found.to_dict() for found in done]) + "\n", "the report")
    return None if all(found.ok for found in done) else _Failed("one check or more failed")


def render(sources: str, bundles: str) -> Any:
    """Write the configs of bundles.

    Args:
        sources: folder with a page for each bundle, and parts/.
        bundles: folder of the bundles.
    """
    from monai_petl.bundle.render import render_all

    written = render_all(sources, bundles)
    return "\n".join(map(str, written)) or "all configs are up to date"


def new_class(bundle: str, out: str, class_names: Sequence[str], weights: str | None = None) -> Any:
    """A copy of a bundle for other classes.

    Args:
        bundle: its folder.
        out: folder to write; its name ends in _segmentation or _classification like the bundle's.
        class_names: such as liver,pancreas: all classes of the copy; for PUNet the last one is the new one.
        weights: the pre-trained file, as train.json takes it; default the bundle's models/model.pt.
    """
    from monai_petl.bundle.new_class import new_class as write_bundle

    return write_bundle(bundle, out, class_names, weights)


def list_backbones() -> str:
    """Pre-trained networks that load by their file."""
    from monai_petl.weights import published

    rows = [("network", "name", "trained on", "licence", "where")]
    rows += [(title, one.name, one.trained_on, one.licence, one.where) for title, one in published()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def inspect_backbone(path: str, json: bool = False, **arguments: Any) -> Any:
    """What a checkpoint is, and what becomes of every tensor.

    Args:
        path: safetensors file, or one of torch.save.
        json: print all tensors as JSON in place of a summary.
        arguments: of the network, where they differ from the file's, for instance --out_channels 3.
    """
    from monai_petl.weights import identify

    account = identify(path, **arguments)
    return _json(account.to_dict()) if json else str(account)


def convert(path: str, out: str, **arguments: Any) -> str:
    """A checkpoint under the names of MONAI's network.

    Args:
        path: safetensors file, or one of torch.save.
        out: .safetensors file to write; the account of all tensors goes to OUT.json.
        arguments: of the network, where they differ from the file's, for instance --out_channels 3.
    """
    from monai_petl.weights import convert_backbone

    return f"{convert_backbone(path, out, **arguments)}\nwritten to {out} and {out}.json"


def inflate(
    source: str,
    out: str,
    network: str,
    img_size: Any = None,
    spatial_dims: int = 3,
    patch_size: Any = None,
    in_channels: int = 3,
    mode: str = "center",
    num_heads: int | None = None,
    grid: Any = None,
    eps: float | None = None,
    family: str | None = None,
    image_mean: Any = None,
    image_std: Any = None,
    class_key_bias: bool = False,
    window_depth: int | None = None,
    downsample: str | None = None,
    channel_mode: str | None = None,
    depth_axis: int = 2,
    position_mode: str = "bicubic",
    table_mode: str = "spline",
    resize_patch: bool = False,
    network_options: Any = None,
) -> str:
    """A 2D pre-trained checkpoint as the weights of a MONAI network, and what became of its tensors.

    Args:
        source: .safetensors or torch file, folder, or name on the Hugging Face hub (timm, torchvision, transformers).
        out: .safetensors file to write; load it by monai_petl.inflation.load_inflated.
        network: vit, swin or resnet.
        img_size: size of the images in voxels, for instance 224,224,5. A resnet needs none.
        spatial_dims: 2 or 3.
        patch_size: for instance 16,16,5. Default: the source's, a vit's as deep as the image.
        in_channels: channels of the images.
        mode: center or average: what the kernel does along depth.
        num_heads: heads of the source, where they cannot be told from its file.
        grid: h,w of the source's position tables. Default: that of the target, or a square.
        eps: epsilon of the source's layer norms.
        family: where the source comes from, such as timm_vit. Default: told by its names.
        image_mean: of each colour, what the source's images were normalised with; folded into the first layer.
        image_std: the same.
        class_key_bias: let several depth tokens start exactly beside a class token (vit).
        window_depth: tokens of a window along depth (swin). Default: the most that starts exactly.
        downsample: merging or mergingv2 (swin).
        channel_mode: share or keep: how input channels are spread. Default: keep when neither channels nor dimensions change.
        depth_axis: spatial axis of depth: 2 for (B, C, H, W, D), 0 for (B, C, D, H, W).
        position_mode: interpolation of position tables: bicubic, bilinear, nearest, nearest-exact or area.
        table_mode: resizing of relative position tables: spline or bicubic.
        resize_patch: allow a patch kernel of another in-plane size to be resized, which is not exact.
        network_options: further arguments of the network, {name: value}.
    """
    from monai_petl.weights.inflation import build_from_pretrained, save_inflated

    if Path(out).exists() and Path(source).exists() and Path(out).samefile(source):
        raise ValueError(f"{out} is the source itself, which would be lost. Give another name")
    sizes = {"img_size": img_size, "spatial_dims": spatial_dims, "patch_size": patch_size, "in_channels": in_channels}
    given = {
        "num_heads": num_heads, "grid": grid, "eps": eps, "family": family, "image_mean": image_mean,
        "image_std": image_std, "class_key_bias": class_key_bias, "window_depth": window_depth,
        "downsample": downsample, "channel_mode": channel_mode, "depth_axis": depth_axis,
        "position_mode": position_mode, "table_mode": table_mode, "resize_patch": resize_patch,
        "network_options": network_options,
    }  # fmt: skip
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    built, report = build_from_pretrained(network, source, mode=mode, **sizes, **options)  # type: ignore[arg-type]
    path = save_inflated(built, out, {"source": source, "mode": mode, **sizes, **options})
    return f"{report}\nwritten to {path}"


class _Failed(str):
    """A last line, with the exit code 1."""

    ok = False


def _json(value: Any) -> str:
    return json_format.dumps(value, indent=4, default=str)
