"""Few labelled images of each class, drawn so that nothing of a patient lies on both sides."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_petl.data.errors import DataError

__all__ = [
    "balancing_weights",
    "few_shot_per_class",
    "few_shot_split",
    "find_leaks",
    "positive_classes",
    "require_disjoint",
]

ImageCase = dict[str, Any]
Cases = Sequence[Mapping[str, Any]]
GROUPS = ("group", "patient", "patient_id", "subject")  # keys of a case that say what it belongs to
PACKED = (".gz", ".mgz")


def positive_classes(case: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of a case's classes: one, or any number of them where its label is a row of zeros and ones."""
    label = case["label"]
    return (int(label),) if np.ndim(label) == 0 else tuple(np.flatnonzero(np.asarray(label)).tolist())


def few_shot_per_class(datalist: Sequence[ImageCase], count: int | None, seed: int = 0) -> list[ImageCase]:
    """Draws ``count`` images of each class. Draws of one seed are nested: the 1 image lies among the 5.

    Images of one group (a patient, near copies) are drawn after all other groups of the class have given one. With several
    labels an image may stand for several classes.

    Args:
        datalist: what :func:`monai_petl.data.load_image_list` gave.
        count: images of each class, None for all.
        seed: seed of the draw.

    Raises:
        ValueError: when count is not positive.
        DataError: when a class has fewer; names it.
    """
    if count is None:
        return list(datalist)
    drawn = {place for places in _drawn(datalist, count, seed, "image", False).values() for place in places}
    return [case for place, case in enumerate(datalist) if place in drawn]


def few_shot_split(
    datalist: Sequence[ImageCase], count: int, seed: int = 0, *, unit: str = "image", published: bool = False
) -> tuple[list[ImageCase], list[ImageCase]]:
    """Draws ``count`` shots of each class, and gives what is left to choose a model by.

    Args:
        datalist: what :func:`monai_petl.data.load_image_list` gave.
        count: shots of each class.
        seed: of the draw; the same on every machine.
        unit: what a shot is: an ``"image"``, or a ``"group"`` (patient, study, slide) with all its images of the class.
        published: as in the few-shot lists of MedFMC that EPT was measured with: an image that is drawn for two classes stands
            there twice, and a class with fewer shots gives all that it has.

    Returns:
        The drawn images, class by class if published; and all that share neither an image nor a group with them.

    Raises:
        ValueError: an argument is out of range.
        DataError: a class has fewer shots, and it is not done as published; names it.
    """
    if unit not in ("image", "group"):
        raise ValueError(f"unit must be 'image' or 'group', got {unit!r}")
    chosen = _drawn(datalist, count, seed, unit, published)
    places = [place for drawn in chosen.values() for place in drawn]
    images = {datalist[place]["image"] for place in places}
    groups = {case["group"] for case in datalist if case["image"] in images}  # of every row that names the file
    rest = [case for case in datalist if case["group"] not in groups]
    if published:
        return [datalist[place] for place in places], rest
    kept = set(places)
    return [case for place, case in enumerate(datalist) if place in kept], rest


def _drawn(datalist: Cases, count: int, seed: int, unit: str, published: bool) -> dict[int, list[int]]:
    """Class -> places of the images that were drawn for it."""
    if count < 1:
        raise ValueError(f"count must be positive, or None for all images, got {count}")
    places: dict[int, list[int]] = defaultdict(list)
    for place, case in enumerate(datalist):
        for label in positive_classes(case):
            places[label].append(place)
    shots: dict[int, list[list[int]]] = {
        label: _shots(datalist, places[label], seed, label, unit) for label in sorted(places)
    }
    short = {label: len(found) for label, found in shots.items() if len(found) < count}
    if short and not published:
        names = {label: _name(datalist[places[label][0]], label) for label in short}
        there = ", ".join(f"{number} of {names[label]}" for label, number in short.items())
        raise DataError(
            f"{count} {unit}s of each class were asked for, but there are {there}; give a smaller number (in a bundle: "
            "num_labelled), or none for all"
        )
    return {label: [place for shot in found[:count] for place in shot] for label, found in shots.items()}


def _shots(datalist: Cases, places: Sequence[int], seed: int, label: int, unit: str) -> list[list[int]]:
    """Shots of a class in the order of the draw, each a list of places."""
    random = np.random.default_rng([seed, label])
    if unit == "group":
        groups: dict[str, list[int]] = defaultdict(list)
        for place in places:
            groups[datalist[place]["group"]].append(place)
        names = sorted(groups)
        return [groups[names[i]] for i in random.permutation(len(names))]
    turn: Counter[str] = Counter()
    ranked = []
    for place in (places[i] for i in random.permutation(len(places))):
        ranked.append((turn[datalist[place]["group"]], place))
        turn[datalist[place]["group"]] += 1
    return [[place] for _, place in sorted(ranked, key=lambda pair: pair[0])]


def _name(case: Mapping[str, Any], label: int) -> str:
    names = str(case["class_name"]).split("|")
    return names[positive_classes(case).index(label)] if len(names) > 1 else names[0]


def balancing_weights(datalist: Cases) -> list[float]:
    """For each image 1 / (images of its class): weights of a sampler that draws all classes equally often.

    With several labels the rarest class of an image counts; images without any are a class of their own.
    """
    classes = [positive_classes(case) or (-1,) for case in datalist]
    count = Counter(label for found in classes for label in found)
    return [max(1.0 / count[label] for label in found) for found in classes]


def find_leaks(sections: Mapping[str, Cases]) -> list[tuple[str, str, str]]:
    """Pairs of images that two sections share.

    Args:
        sections: name -> cases with an ``image`` and, where it is known, one of the keys ``group``, ``patient``,
            ``patient_id``, ``subject``.

    Returns:
        (why, image of one section, image of another): ``"the same file"``, ``"the same content"`` (bytes, compressed or not),
        or ``"one group"`` (``"one patient"``, ...); one pair for each image of the later section.
    """
    leaks = []
    seen: dict[tuple[str, str], tuple[str, str]] = {}  # what is compared -> section and image
    twins = _possible_copies(sections)
    for name, cases in sections.items():
        for case in cases:
            image = str(case["image"])
            keys = [("the same file", os.path.realpath(image))]
            if image in twins:
                keys.append(("the same content", _digest(image)))
            keys += [
                (f"one {key.removesuffix('_id')}", str(case[key])) for key in GROUPS if case.get(key) not in (None, "")
            ]
            shared = [(key, seen[key]) for key in keys if key in seen and seen[key][0] != name]
            found = next(
                (pair for pair in shared if pair[0][0] != "the same content" or _equal(pair[1][1], image)), None
            )
            if found:
                leaks.append((found[0][0], found[1][1], image))
            for key in keys:
                seen.setdefault(key, (name, image))
    return leaks


def _possible_copies(sections: Mapping[str, Cases]) -> set[str]:
    """Images that have one of the same size in another section: only these can have the same content."""
    sizes: dict[int, dict[str, str]] = defaultdict(dict)  # bytes -> image -> section
    for name, cases in sections.items():
        for image in {str(case["image"]) for case in cases}:
            if os.path.isfile(image):
                sizes[_unpacked_size(image)][image] = name
    return {image for images in sizes.values() if len({*images.values()}) > 1 for image in images}


def _unpacked_size(image: str) -> int:
    """Bytes of a file; of one that gzip has packed, the bytes before (modulo 2^32), which stand at its end."""
    return (
        struct.unpack("<I", _tail(image)[4:])[0] if image.lower().endswith(PACKED) else os.path.getsize(image) % 2**32
    )


def _digest(image: str) -> str:
    """A checksum of the content; gzip keeps one of what it has packed, so that nothing has to be unpacked."""
    if image.lower().endswith(PACKED):
        return f"{struct.unpack('<I', _tail(image)[:4])[0]:08x}"
    checksum = 0
    with open(image, "rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def _equal(first: str, second: str) -> bool:
    """Whether two files hold the same, where their checksums agree."""
    digests = set()
    for image in (first, second):
        digest = hashlib.blake2b()
        with gzip.open(image) if image.lower().endswith(PACKED) else open(image, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        digests.add(digest.digest())
    return len(digests) == 1


def _tail(image: str) -> bytes:
    with open(image, "rb") as file:
        file.seek(max(os.path.getsize(image) - 8, 0))
        return file.read(8).rjust(8, b"\0")


def require_disjoint(sections: Mapping[str, Cases]) -> None:
    """Stops where a section holds what another one holds.

    Args:
        sections: see :func:`find_leaks`.

    Raises:
        DataError: names the first pairs.
    """
    leaks = find_leaks(sections)
    if leaks:
        first = "; ".join(f"{second} and {one} ({why})" for why, one, second in leaks[:3])
        more = f"; and {len(leaks) - 3} more" if len(leaks) > 3 else ""
        raise DataError(
            f"{' and '.join(sections)} share {len(leaks)} images: {first}{more}. A score on images of the same patients means "
            "nothing: keep what belongs together in one section"
        )
