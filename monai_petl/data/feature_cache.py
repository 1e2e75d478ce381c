"""Features of a frozen network on disk: computed once for every image, read in training.

A file an image, named after a digest of the image's bytes, so that images of the same name never share one and the same image
in two sections does. The folder says in ``cache.json`` by which weights and settings its features were made, and is refused
with others. Files appear whole or not at all: several processes may fill one folder, and an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from monai_petl.files.atomic import errors_in_a_sentence, move_into_place, partial_folder
from monai_petl.files.json_files import read_object
from monai_petl.files.tensor_files import save_tensors

__all__ = ["FeatureCache", "preload_states", "weights_digest"]

logger = logging.getLogger(__name__)

MANIFEST = "cache.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEADERS = {".mhd", ".hdr"}  # whose voxels are in another file
HEADER = 4096  # bytes of a file besides its tensors, at most


class FeatureCache:
    """A folder of features.

    Args:
        folder: made when something is written.
        settings: all that the features depend on besides the image: weights (:func:`weights_digest`), sizes, preprocessing.
        dtype: of the stored features, a key of ``DTYPES``; ``float16`` is half of ``float32``.

    Raises:
        ValueError: the folder holds features of other settings, with what differs; there is no such dtype.

    Example::

        cache = FeatureCache("features", {"weights": weights_digest(network.backbone), "img_size": [512, 512]})
        cache.fill(images, load, lambda batch: dict(zip(("key_states", "value_states"), network.encode(batch))))
        features = cache.read("benign/scan_1.png")
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], dtype: str = "float16") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        self.folder = Path(folder)
        self.dtype = DTYPES[dtype]
        self.settings = json.loads(json.dumps({**settings, "dtype": dtype}))
        self._check()

    def path(self, image: str | os.PathLike) -> Path:
        """Where the features of an image are, or go."""
        return self.folder / f"{_file_digest(image)}.safetensors"

    def read(self, image: str | os.PathLike) -> dict[str, Tensor]:
        """The features of an image, as they were stored.

        Raises:
            FileNotFoundError: there are none.
            ValueError: their file is damaged.
        """
        path = self.path(image)
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder} holds no features of {image}; compute them first (preload), or set cache_dir to null"
            )
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path}, the features of {image}, is damaged: {error}. Delete it and preload again"
            ) from error

    def missing(self, images: Iterable[str | os.PathLike]) -> list[str]:
        """Images without features, each content once."""
        found = {self.path(image): os.fspath(image) for image in images}
        return [image for path, image in found.items() if not path.is_file()]

    def fill(
        self,
        images: Sequence[str | os.PathLike],
        load: Callable[[str], Tensor],
        compute: Callable[[Tensor], Mapping[str, Tensor]],
        batch_size: int = 8,
        device: torch.device | str = "cpu",
    ) -> int:
        """Compute what is missing; returns how many images that were.

        Args:
            images: files.
            load: a file as the frozen network takes it, (C, *size).
            compute: features of a batch (B, C, *size), with B as their first axis.
            batch_size: images at a time.
            device: where they are computed.
        """
        wanted = self.missing(images)
        self._claim()
        with (
            tqdm(total=len(wanted), desc="features", disable=None) as bar,
            partial_folder(self.folder / "cache") as parts,
        ):
            for start in range(0, len(wanted), batch_size):
                names = [name for name in wanted[start : start + batch_size] if not self.path(name).is_file()]
                bar.update(min(batch_size, len(wanted) - start))
                if not names:  # another process was faster
                    continue
                with torch.no_grad():
                    batch = torch.stack([load(name) for name in names]).to(device)
                    features = {name: self._stored(name, value) for name, value in compute(batch).items()}
                for place, name in enumerate(names):
                    path, own = self.path(name), {n: value[place] for n, value in features.items()}
                    with errors_in_a_sentence(path, f"the features of {name}"):
                        save_tensors(parts / path.name, own, {})
                        move_into_place(parts / path.name, path)
        return len(wanted)

    def require_space(self, images: Iterable[str | os.PathLike], numbers: int) -> None:
        """Stop before anything is computed if the disk is too small for what is missing; the log says how large that is.

        Args:
            images: files.
            numbers: of which the features of an image consist.

        Raises:
            OSError: the disk is too small.
        """
        count, each = len(self.missing(images)), numbers * self.dtype.itemsize + HEADER
        there = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.is_dir())
        needed, free = count * each, shutil.disk_usage(there).free
        logger.info("features of %d images: %.1f MB each, %.2f GB", count, each / 1e6, needed / 1e9)
        if needed > free:
            raise OSError(
                f"the features of {count} images need {needed / 1e9:.2f} GB in {self.folder}, where {free / 1e9:.2f} GB are "
                "free; choose another folder, dtype='float16', a smaller token_ratio, or set cache_dir to null"
            )

    def _stored(self, name: str, value: Tensor) -> Tensor:
        stored = value.to(self.dtype).cpu()
        if not stored.isfinite().all() and value.isfinite().all():
            raise ValueError(
                f"{name} reach {value.abs().max():.3g}, which {self.settings['dtype']} cannot hold; use bfloat16 or float32"
            )
        return stored

    def _claim(self) -> None:
        """Say what the features are made by; whoever comes second finds it and compares."""
        manifest = self.folder / MANIFEST
        with partial_folder(manifest) as folder:
            partial = folder / MANIFEST
            partial.write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
            try:
                os.link(partial, manifest)  # whole at once, and refused where there is one
            except FileExistsError:
                pass  # another process was first: what it wrote is compared below
            except OSError:  # a file system without links; of two at the very same moment the later one wins
                if not manifest.is_file():
                    partial.replace(manifest)
        self._check()

    def _check(self) -> None:
        manifest = self.folder / MANIFEST
        filled = any(self.folder.glob("*.safetensors"))  # looked for first: features come behind their manifest
        if not manifest.is_file():
            if filled:
                raise ValueError(
                    f"{self.folder} holds features, and no {MANIFEST} that says how they were made; give another folder, or "
                    "delete it"
                )
            return
        there = read_object(manifest, f"Delete {self.folder} and preload again")
        other = [
            f"{name} ({there.get(name)!r} there, {self.settings.get(name)!r} now)"
            for name in sorted({*there, *self.settings})
            if there.get(name) != self.settings.get(name)
        ]
        if other:
            raise ValueError(
                f"{self.folder} holds features that were made otherwise: {', '.join(other)}. Give another cache_dir, or "
                "delete it"
            )


class Encoder(Protocol):
    """A network whose frozen part can be asked alone."""

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, ...) each."""

    def states_shape(self) -> Sequence[int]:
        """Of keys, and of values, of an image."""


def preload_states(
    network: Encoder,
    cache: FeatureCache,
    images: Sequence[str | os.PathLike],
    transform: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    key: str = "source",
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> int:
    """Fill a cache with keys and values of a frozen transformer; returns how many images were missing.

    Args:
        network: with the methods of :class:`Encoder`, such as :class:`monai_petl.networks.FPT`.
        cache: to fill.
        images: files.
        transform: from ``{"image": file}`` to a case with what the transformer takes.
        key: under which that is.
        batch_size: images at a time.
        device: of the network.

    Raises:
        OSError: the disk is too small for what is missing; nothing has been computed.
    """
    cache.require_space(images, 2 * math.prod(network.states_shape()))
    return cache.fill(
        images,
        lambda path: torch.as_tensor(transform({"image": path})[key]),
        lambda batch: dict(zip(("key_states", "value_states"), network.encode(batch), strict=True)),
        batch_size,
        device,
    )


def weights_digest(network: torch.nn.Module) -> str:
    """A digest of the names and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _file_digest(image: str | os.PathLike) -> str:
    if Path(image).is_dir() or Path(image).suffix.lower() in HEADERS:
        raise ValueError(
            f"{image} is not an image in one file, by whose content its features could be found; convert it"
        )
    stat = os.stat(image)
    return _digest_of(os.fspath(image), stat.st_mtime_ns, stat.st_size)


@cache
def _digest_of(path: str, changed: int, size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]
