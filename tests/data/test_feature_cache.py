"""Features of a frozen network on disk: found by content and settings, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from monai.data import CacheDataset
from monai.networks.nets import ViT
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from PIL import Image
from torch import Tensor

from monai_petl.data import FeatureCache, feature_cache, preload_states, weights_digest
from monai_petl.files.tensor_files import save_tensors
from monai_petl.networks import FPT
from monai_petl.transforms import LoadFeaturesd

SETTINGS = {"weights": "abc", "img_size": [32, 32]}


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Two files of each of two classes, under the same names."""
    random = np.random.default_rng(0)
    paths = []
    for kind in ("benign", "malignant"):
        for number in range(2):
            path = tmp_path / "data" / kind / f"scan_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (8, 8), np.uint8)).save(path)
            paths.append(str(path))
    return paths


def load(path: str) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path), np.float32) / 255)[None]


def compute(batch: Tensor) -> dict[str, Tensor]:
    return {"mean": batch.mean((2, 3)), "rows": batch.sum(3)}


def test_features_come_back_by_content_not_by_name(tmp_path, images) -> None:
    cache = FeatureCache(tmp_path / "features", SETTINGS, "float32")
    assert cache.fill(images, load, compute, batch_size=3) == 4
    assert len(list(cache.folder.glob("*.safetensors"))) == 4
    for image in images:
        wanted = compute(load(image)[None])
        found = cache.read(image)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name][0]) for name in wanted)
    copy = tmp_path / "renamed.png"
    shutil.copy(images[0], copy)
    assert torch.equal(cache.read(copy)["rows"], cache.read(images[0])["rows"])
    assert cache.missing([*images, copy]) == []


def test_a_changed_image_has_other_features(tmp_path, images) -> None:
    cache = FeatureCache(tmp_path / "features", SETTINGS)
    cache.fill(images, load, compute)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(images[0])
    assert cache.missing(images) == [images[0]]
    with pytest.raises(FileNotFoundError, match=r"holds no features of .*scan_0.png; compute them first"):
        cache.read(images[0])


def test_half_precision_is_half_the_size(tmp_path, images) -> None:
    def large(batch: Tensor) -> dict[str, Tensor]:
        return {"states": batch.mean() + torch.zeros(len(batch), 50_000)}

    sizes = {}
    for dtype in ("float16", "bfloat16", "float32"):
        cache = FeatureCache(tmp_path / dtype, SETTINGS, dtype)
        cache.fill(images[:1], load, large)
        assert cache.read(images[0])["states"].dtype == getattr(torch, dtype)
        sizes[dtype] = cache.path(images[0]).stat().st_size
    assert 100_000 < sizes["float16"] == sizes["bfloat16"] < 104_096
    assert 200_000 < sizes["float32"] < 204_096


def test_an_interrupted_one_goes_on(tmp_path, images) -> None:
    cache, seen = FeatureCache(tmp_path / "features", SETTINGS), []

    def broken(batch: Tensor) -> dict[str, Tensor]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(batch))
        return compute(batch)

    with pytest.raises(KeyboardInterrupt):
        cache.fill(images, load, broken, batch_size=1)
    assert len(cache.missing(images)) == 2
    assert not list(cache.folder.glob("*.partial"))
    assert FeatureCache(tmp_path / "features", SETTINGS).fill(images, load, compute) == 2
    assert cache.missing(images) == []


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, images, monkeypatch) -> None:
    cache = FeatureCache(tmp_path / "features", SETTINGS)

    def full(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("monai_petl.data.feature_cache.save_tensors", full)
    with pytest.raises(OSError, match=r"cannot write the features of .*: No space left on device\. .* MiB are free"):
        cache.fill(images, load, compute)
    assert [path.name for path in cache.folder.iterdir()] == ["cache.json"]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"weights": "def", "img_size": [32, 32]}, r"weights \('abc' there, 'def' now\)"),
        ({"weights": "abc", "img_size": [64, 64]}, r"img_size \(\[32, 32\] there, \[64, 64\] now\)"),
        ({"weights": "abc"}, r"img_size \(\[32, 32\] there, None now\)"),
    ],
)
def test_features_of_other_settings_are_refused(tmp_path, images, other, difference) -> None:
    FeatureCache(tmp_path / "features", SETTINGS).fill(images, load, compute)
    with pytest.raises(ValueError, match=f"made otherwise: {difference}. Give another cache_dir"):
        FeatureCache(tmp_path / "features", other)
    with pytest.raises(ValueError, match=r"dtype \('float16' there, 'float32' now\)"):
        FeatureCache(tmp_path / "features", SETTINGS, "float32")


def test_a_second_process_with_other_settings_is_stopped(tmp_path, images) -> None:
    first, second = FeatureCache(tmp_path / "features", SETTINGS), FeatureCache(tmp_path / "features", {"weights": "x"})
    first.fill(images[:1], load, compute)
    with pytest.raises(ValueError, match="made otherwise"):
        second.fill(images, load, compute)
    assert len(list(first.folder.glob("*.safetensors"))) == 1


class Network:
    """What is stored of an image are its rows and its columns; counts its calls."""

    calls = 0

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return image.sum(3)[:, 0], image.sum(2)[:, 0]

    def states_shape(self) -> tuple[int, ...]:
        return (8,)


def preload(folder: Path, images: list[str], dtype: str = "float16") -> Network:
    network = Network()
    preload_states(network, FeatureCache(folder, SETTINGS, dtype), images, lambda case: {"source": load(case["image"])})
    return network


def test_a_disk_that_is_too_small_is_said_before_anything_is_computed(tmp_path, images, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("monai_petl.data.feature_cache.shutil.disk_usage", lambda path: usage(9, 9, 1000))
    monkeypatch.setattr(Network, "encode", lambda *_: pytest.fail("computed"))
    with pytest.raises(
        OSError, match=r"features of 4 images need 0.00 GB in .*, where 0.00 GB are free; choose another folder"
    ):
        preload(tmp_path / "features", images)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("float32", 4)])
def test_the_space_is_that_of_what_is_missing(tmp_path, images, monkeypatch, caplog, dtype, size) -> None:
    """Two times 8 numbers an image, and at most 4096 bytes of the file beside them."""
    needed = 3 * (16 * size + 4096)
    cache = FeatureCache(tmp_path / "features", SETTINGS, dtype)
    preload(cache.folder, images[:1], dtype)
    assert 16 * size < cache.path(images[0]).stat().st_size <= 16 * size + 4096
    usage, free = namedtuple("usage", "total used free"), [needed - 1]
    monkeypatch.setattr("monai_petl.data.feature_cache.shutil.disk_usage", lambda path: usage(9, 9, free[0]))
    with pytest.raises(OSError, match="features of 3 images"):
        cache.require_space(images, 16)
    free[0] = needed
    with caplog.at_level("INFO"):
        cache.require_space(images, 16)
    assert "features of 3 images: 0.0 MB each, 0.00 GB" in caplog.text


def test_the_log_says_the_size_before_the_first_batch(tmp_path, images, monkeypatch, caplog) -> None:
    monkeypatch.setattr(Network, "states_shape", lambda self: (6, 12, 205, 64))  # of FPT+ at 512 pixels
    seen: list[str] = []
    monkeypatch.setattr(Network, "encode", lambda *_: seen.append(caplog.text) or (torch.zeros(4, 1),) * 2)
    with caplog.at_level("INFO"):
        preload(tmp_path / "features", images)
    assert "features of 4 images: 3.8 MB each, 0.02 GB" in seen[0]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_is_shown_in_a_terminal_alone(tmp_path, images, monkeypatch, capsys, terminal) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    preload(tmp_path / "features", images)
    assert ("features: 100%" in capsys.readouterr().err) == terminal


def test_features_without_their_settings_are_refused(tmp_path, images) -> None:
    cache = FeatureCache(tmp_path / "features", SETTINGS)
    cache.fill(images, load, compute)
    (cache.folder / "cache.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cache.json is damaged: .* preload again"):
        FeatureCache(tmp_path / "features", SETTINGS)
    (cache.folder / "cache.json").unlink()
    with pytest.raises(ValueError, match=r"holds features, and no cache.json that says how they were made"):
        FeatureCache(tmp_path / "features", {"weights": "other"})


def test_values_that_half_precision_cannot_hold_are_refused(tmp_path, images) -> None:
    def large(batch: Tensor) -> dict[str, Tensor]:
        return {"states": torch.full((len(batch), 2), 1e5)}

    with pytest.raises(ValueError, match=r"states reach 1e\+05, which float16 cannot hold; use bfloat16 or float32"):
        FeatureCache(tmp_path / "half", SETTINGS).fill(images, load, large)
    assert FeatureCache(tmp_path / "brain", SETTINGS, "bfloat16").fill(images, load, large) == 4


def test_images_of_several_files_are_refused(tmp_path) -> None:
    (tmp_path / "scan.mhd").write_text("ElementDataFile = scan.raw", encoding="utf-8")
    for path in (tmp_path / "scan.mhd", tmp_path):
        with pytest.raises(ValueError, match="is not an image in one file"):
            FeatureCache(tmp_path / "features", SETTINGS).path(path)


def test_a_damaged_file_is_named(tmp_path, images) -> None:
    cache = FeatureCache(tmp_path / "features", SETTINGS)
    cache.fill(images, load, compute)
    cache.path(images[0]).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"the features of .*scan_0.png, is damaged.*preload again"):
        cache.read(images[0])
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32; got 'int8'"):
        FeatureCache(tmp_path / "features", SETTINGS, "int8")


# several processes


def at_lines(run: Callable[[], object], other: Callable[[int], object]) -> None:
    """Runs the one, and before each line of the module that it comes to the other, as a second process may come by."""
    lines = count()

    def trace(frame: FrameType, event: str, argument: object) -> Callable | None:
        if frame.f_code.co_filename != feature_cache.__file__:
            return None
        if event == "line":
            other(next(lines))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("links", [True, False])
def test_who_looks_while_a_folder_is_filled_sees_whole_files_alone(tmp_path, images, monkeypatch, links) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links on this file system")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    seen = set()

    def look(_: int) -> None:
        cache = FeatureCache(tmp_path / "features", SETTINGS)
        there = [image for image in images if not cache.missing([image])]
        assert all(cache.read(image).keys() == {"mean", "rows"} for image in there)
        seen.add((cache.folder.joinpath("cache.json").is_file(), len(there)))

    def save_in_two_steps(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        path.write_bytes(b"half")
        look(0)
        save_tensors(path, tensors, header)

    monkeypatch.setattr(feature_cache, "save_tensors", save_in_two_steps)
    at_lines(lambda: FeatureCache(tmp_path / "features", SETTINGS).fill(images, load, compute, batch_size=3), look)
    assert seen == {(False, 0), *((True, count) for count in range(5))}
    assert len(list((tmp_path / "features").iterdir())) == 5


def meet(folder: Path, image: str, moment: int) -> set[str]:
    """Who of two with different settings is refused, when the second comes at a line of the first; nobody if it never came."""
    refused = {}

    def fill(weights: str) -> None:
        try:
            FeatureCache(folder, {"weights": weights}).fill([image], load, compute)
        except ValueError as error:
            refused[weights] = str(error)

    at_lines(lambda: fill("first"), lambda line: fill("second") if line == moment else None)
    assert all("made otherwise" in sentence for sentence in refused.values())
    return set(refused)


def test_of_two_settings_one_gets_the_folder_whenever_the_second_comes(tmp_path, images) -> None:
    winners = set()
    for moment in count():
        refused = meet(tmp_path / str(moment), images[0], moment)
        if not refused:
            break
        text = (tmp_path / str(moment) / "cache.json").read_text(encoding="utf-8")
        winners.add(json.loads(text)["weights"])
        assert refused == {"first", "second"} - {json.loads(text)["weights"]}
    assert winners == {"first", "second"}
    assert moment > 20


SCRIPT = """
import sys, time
from pathlib import Path
from tests.data.test_feature_cache import FeatureCache, SETTINGS, compute, load
folder, mark, *images = sys.argv[1:]
def together(batch):
    Path(mark).touch()
    while len(list(Path(mark).parent.glob("*.here"))) < 2:
        time.sleep(0.01)
    return compute(batch)
FeatureCache(folder, SETTINGS).fill(images, load, together, batch_size=1)
"""


def test_two_processes_fill_one_folder(tmp_path, images) -> None:
    """Neither writes before both compute, and so both compute the same image."""
    repository = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "features"), str(tmp_path / f"{n}.here"), *images],
            cwd=repository,
        )
        for n in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    cache = FeatureCache(tmp_path / "features", SETTINGS)
    assert cache.missing(images) == []
    for image in images:
        assert torch.equal(cache.read(image)["rows"], compute(load(image)[None])["rows"][0].half())
    assert {path.suffix for path in cache.folder.iterdir()} == {".json", ".safetensors"}


def test_weights_have_a_digest() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = weights_digest(network)
    assert weights_digest(network) == before
    network[1].num_batches_tracked += 1
    assert weights_digest(network) != before


def test_features_stand_beside_the_image_in_a_dataset(tmp_path, images) -> None:
    cache = FeatureCache(tmp_path / "features", SETTINGS)
    cache.fill(images, load, compute)
    transforms = Compose(
        [LoadFeaturesd("image", cache), LoadImaged("image", image_only=True), EnsureChannelFirstd("image")]
    )
    dataset = CacheDataset([{"image": path} for path in images], transforms, progress=False)
    for item, path in zip(dataset, images, strict=True):
        assert torch.equal(item["rows"], cache.read(path)["rows"])
        assert item["image"].shape == (1, 8, 8)


def test_the_size_of_an_entry_is_that_of_its_states(tmp_path, images) -> None:
    vit = ViT(3, (64, 64), (16, 16), 48, 96, 4, 3, spatial_dims=2, classification=True, qkv_bias=True)
    network = FPT(vit, 2, (64, 64), side_size=(32, 32), side_width=24, side_heads=3)
    cache = FeatureCache(tmp_path / "features", {"weights": weights_digest(vit)}, "float32")

    def states(batch: Tensor) -> dict[str, Tensor]:
        large = torch.nn.functional.interpolate(batch.expand(-1, 3, -1, -1), (64, 64))
        return dict(zip(("key_states", "value_states"), network.encode(large), strict=True))

    cache.fill(images, load, states)
    layers, heads, tokens, channels = network.states_shape()
    assert (layers, heads, tokens, channels) == (2, 3, 3, 16)
    size = cache.path(images[0]).stat().st_size
    assert 0 <= size - 2 * layers * heads * tokens * channels * 4 < 4096
    assert json.loads((cache.folder / "cache.json").read_text(encoding="utf-8"))["dtype"] == "float32"
