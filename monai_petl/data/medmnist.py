"""A file of MedMNIST as a folder of images with their table.

J. Yang et al., "MedMNIST v2: A large-scale lightweight benchmark for 2D and 3D biomedical image classification", Scientific
Data 10, 41 (2023).
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from monai_petl.data.datalist import DataError, PathLike, new_dataset_folder

__all__ = ["make_medmnist_folder"]

PARTS = {"train": "training", "val": "validation", "test": "test"}


def make_medmnist_folder(
    source: PathLike, out: PathLike, class_names: Sequence[str] = (), multi_label: bool | None = None
) -> Path:
    """Write the images of ``<name>mnist.npz`` as PNG (volumes as .npy) with a ``labels.csv``, for bundles.

    Args:
        source: holds ``train_images`` (N, H, W), (N, H, W, 3) or volumes (N, D, H, W) of bytes, ``train_labels`` (N, 1) or
            (N, K), and the same for ``val`` and ``test``.
        out: the folder to make.
        class_names: names of the classes; default their numbers.
        multi_label: whether labels are rows of zeros and ones; default if they have several columns.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``out`` holds files.
        DataError: the file is none of MedMNIST's, or has more classes than names.
    """
    arrays = _arrays(Path(source))
    several = arrays["train_labels"].shape[1] > 1 if multi_label is None else multi_label
    count = (
        arrays["train_labels"].shape[1] if several else 1 + max(int(arrays[f"{part}_labels"].max()) for part in PARTS)
    )
    names = list(class_names) or [str(number) for number in range(count)]
    if len(names) != count:
        raise DataError(f"{source} has {count} classes, and {len(names)} names were given: {', '.join(names)}")
    with new_dataset_folder(out) as folder:
        (folder / "images").mkdir()
        with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file", "label", "class_name", "split"])
            for part, section in PARTS.items():
                pairs = zip(arrays[f"{part}_images"], arrays[f"{part}_labels"], strict=True)
                total = len(arrays[f"{part}_images"])
                for number, (image, label) in enumerate(tqdm(pairs, section, total, disable=None)):
                    path = _write(image, folder / "images" / f"{part}_{number:06d}")
                    classes = [names[place] for place in (np.flatnonzero(label) if several else [int(label[0])])]
                    place = "" if several else int(label[0])
                    table.writerow([path.relative_to(folder), place, "|".join(classes), section])
    return Path(out)


def _arrays(source: Path) -> Mapping[str, np.ndarray]:
    wanted = [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")]
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays = {name: file[name] for name in wanted if name in file}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{source} cannot be read as a file of MedMNIST: {error}") from error
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise DataError(f"{source} is no file of MedMNIST: it has no {', '.join(missing)}")
    for part in PARTS:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.ndim != 2 or len(labels) != len(images):
            raise DataError(
                f"{source}: {part} has images {images.shape} of {images.dtype} and labels {labels.shape}; wanted are "
                "(N, H, W), (N, H, W, 3) or (N, D, H, W) of uint8, and (N, 1) or (N, classes)"
            )
    return arrays


def _write(image: np.ndarray, stem: Path) -> Path:
    if image.ndim == 3 and image.shape[2] != 3:
        np.save(stem.with_suffix(".npy"), image, allow_pickle=False)
        return stem.with_suffix(".npy")
    Image.fromarray(image).save(stem.with_suffix(".png"))
    return stem.with_suffix(".png")
