"""Command line: ``python -m monai_petl VERB``."""

from __future__ import annotations

import json
import sys
from typing import Any

import fire

__all__ = ["main"]


def summary(config: str, json: bool = False, **overrides: Any) -> None:
    """Print the parameters of a bundle's adapted network: in all, trained, frozen.

    Args:
        config: a bundle's folder (its configs/train.json is read) or a config file.
        json: print {"total", "trainable", "frozen", "fraction"} as JSON in place of a table.
        overrides: top-level ids of the config, for instance --variant full.
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


def demo(**options: Any) -> None:
    """Pre-train, teach a new class from a few volumes, segment, and write a report. Options: see monai_petl.demo.demo."""
    from monai_petl.demo import demo as run

    run(**options)


def main() -> None:
    """Run a verb; an error that a user can mend is one sentence and exit code 1."""
    try:
        fire.Fire({"summary": summary, "adapter": Adapter, "data": Data, "demo": demo}, name="python -m monai_petl")
    except Exception as error:
        cause = error
        while type(cause) is RuntimeError and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__  # MONAI wraps what is raised in a config
        if not isinstance(cause, (ValueError, OSError, KeyError)):
            raise
        sys.exit(f"error: {cause.args[0] if isinstance(cause, KeyError) else cause}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=4, default=str))


if __name__ == "__main__":
    main()
