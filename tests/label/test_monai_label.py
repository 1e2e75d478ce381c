"""Every segmentation bundle in a real MONAI Label server: infers, takes a label, learns from one and from two, and reloads.

``make test-label`` makes the server's environment and names its Python in ``MONAI_LABEL_PYTHON``; elsewhere these are skipped.
The server runs on loopback, offline, with the ``monaibundle`` app that comes with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from docs.support_table import rows_in
from monai_petl.bundle import BundleFolder
from monai_petl.data import class_names, make_phantom_dataset
from tests.bundles.helpers import AIM, REPOSITORY, SEGMENTERS, SIZE, SPACING, Bundle, named, parsed, state_in

PYTHON = os.environ.get("MONAI_LABEL_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs an environment with MONAI Label: make test-label"),
]
SCORED = AIM  # has no dropout of its own
STARTS, TRAINS = 180.0, 300.0  # seconds at most


@dataclass(frozen=True)
class Server:
    """A running server and what it serves."""

    address: str
    models: Path
    phantoms: Path
    log: Path

    def call(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
        """One request; the answer's body. An error shows the end of the server's log."""
        request = urllib.request.Request(
            f"{self.address}{path}", body or None, {"Content-Type": kind, "Accept": "*/*"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=TRAINS) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error}; the server says:\n{self.tail()}") from error

    def form(self, method: str, path: str, fields: dict[str, tuple[str | None, bytes]]) -> bytes:
        """A request with a form: name -> (file name, contents)."""
        boundary, parts = uuid.uuid4().hex, []
        for name, (filename, contents) in fields.items():
            place = f'; filename="{filename}"' if filename else ""
            parts += [
                f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{place}\r\n\r\n'.encode(),
                contents,
            ]
            parts.append(b"\r\n")
        body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
        return self.call(method, path, body, f"multipart/form-data; boundary={boundary}")

    def infer(self, bundle: Bundle, image: str, folder: Path) -> nib.Nifti1Image:
        path = folder / f"{uuid.uuid4().hex}.nii.gz"
        params = {"params": (None, json.dumps({"device": "cpu"}).encode())}
        path.write_bytes(self.form("POST", f"/infer/{bundle.name}?image={image}&output=image", params))
        return nib.load(path)

    def submit(self, image: str, label: Path, names: list[str]) -> None:
        info = [{"name": name, "idx": value} for value, name in enumerate(names, 1)]
        fields = {
            "label": (label.name, label.read_bytes()),
            "params": (None, json.dumps({"label_info": info}).encode()),
        }
        self.form("PUT", f"/datastore/label?image={image}&tag=final", fields)

    def train(self, bundle: Bundle, **options: Any) -> str:
        """A training, to its end; what the server says of it."""
        request = {"max_epochs": 1, "val_split": 0.2, "multi_gpu": False, "device": "cpu", **options}
        self.call("POST", f"/train/{bundle.name}", json.dumps(request).encode())
        end = time.monotonic() + TRAINS
        while time.monotonic() < end:
            task = json.loads(self.call("GET", "/train/?all=false"))
            if task.get("status") in ("DONE", "ERROR", "STOPPED"):
                assert task["status"] == "DONE", self.tail()
                return "\n".join(task.get("details", []))
            time.sleep(0.5)
        raise AssertionError(f"no end of the training after {TRAINS:g} s; the server says:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-60:])


def small_copy(bundle: Bundle, folder: Path) -> None:
    """A copy with small networks and short epochs, and a complete, untrained ``model.pt``, as a user finds it."""
    copy = BundleFolder(bundle.path).small_copy(folder / bundle.name)
    copy.write("train", {**copy.config("train"), **bundle.settings["train"], "lr": 0.05})
    copy.write("inference", {**copy.config("inference"), "class_names": bundle.classes})
    described = copy.config("metadata")
    channels = {str(value): name for value, name in enumerate(["background", *bundle.classes])}
    described["network_data_format"]["outputs"]["pred"]["channel_def"] = channels
    copy.write("metadata", described)
    copy.model.parent.mkdir()
    write_network(bundle, copy.root, seed=0)


def write_network(bundle: Bundle, root: Path, seed: int) -> None:
    """A complete ``model.pt`` of random values."""
    torch.manual_seed(seed)
    network = parsed(bundle.workflow("inference", root, root / "no_data"), "network_def")
    torch.save(network.state_dict(), root / "models" / "model.pt")


def label_for(bundle: Bundle, phantoms: Path, image: str, folder: Path) -> Path:
    """The reference of a phantom with the bundle's own numbers of the classes, as a viewer would send it."""
    source = nib.load(phantoms / "labelsTr" / f"{image}.nii.gz")
    values, ids = np.asarray(source.dataobj), class_names(phantoms)
    renumbered = np.zeros_like(values)
    for value, name in enumerate(bundle.classes, 1):
        renumbered[values == ids[name]] = value
    nib.save(nib.Nifti1Image(renumbered, source.affine), folder / f"{image}.nii.gz")
    return folder / f"{image}.nii.gz"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("label")
    phantoms = make_phantom_dataset(root / "phantoms", 2, 0, 0, 0, SIZE, SPACING)
    app, studies, log = root / "apps" / "monaibundle", root / "studies", root / "server.log"
    environment = {
        **os.environ,
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
        # The server's own watch over the folder empties its list for a moment, which a request may find.
        "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "MPLBACKEND": "agg",
    }
    environment["PYTHONPATH"] = str(Path(__file__).parent / "environment")
    environment["PATH"] = f"{Path(PYTHON or '').parent}{os.pathsep}{environment['PATH']}"
    monailabel = [str(PYTHON), "-m", "monailabel.main"]
    download = [*monailabel, "apps", "--download", "--name", "monaibundle", "--output", str(app.parent)]
    subprocess.run(download, cwd=root, env=environment, check=True, capture_output=True)
    for bundle in SEGMENTERS:
        small_copy(bundle, app / "model")
    studies.mkdir()
    for image in sorted((phantoms / "imagesTr").iterdir()):
        (studies / image.name).write_bytes(image.read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ",".join(bundle.name for bundle in SEGMENTERS)
    options = {"app": app, "studies": studies, "host": "127.0.0.1", "port": port}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    settings = {"models": names, "zoo_source": "local", "sam2": "false", "epistemic_model": SCORED.name}
    arguments += [text for name, value in settings.items() for text in ("--conf", name, value)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*monailabel, "start_server", *arguments],
            cwd=root,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    served = Server(f"http://127.0.0.1:{port}", app / "model", phantoms, log)
    try:
        end = time.monotonic() + STARTS
        while True:
            try:
                urllib.request.urlopen(f"{served.address}/info/", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, served.tail()
                assert time.monotonic() < end, served.tail()
                time.sleep(0.5)
        yield served
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_the_server_lists_every_bundle_with_its_classes(server: Server) -> None:
    info = json.loads(server.call("GET", "/info/"))
    for bundle in SEGMENTERS:
        classes = bundle.classes
        assert info["models"][bundle.name]["labels"] == {name: value for value, name in enumerate(classes, 1)}
        assert info["models"][bundle.name]["type"] == "segmentation"
        assert bundle.name in info["trainers"]


def test_unlabelled_images_are_scored_by_repeated_predictions(server: Server) -> None:
    request = json.dumps({"device": "cpu", "simulation_size": 3, "max_workers": 1}).encode()
    server.call("POST", f"/scoring/{SCORED.name}?run_sync=true", request)
    images = json.loads(server.call("GET", "/datastore/?output=all"))["objects"].values()
    scores = [held["image"]["info"]["epistemic_entropy"] for held in images]
    assert len(scores) == 2
    assert all(np.isfinite(score) for score in scores)


@pytest.mark.parametrize("bundle", SEGMENTERS, ids=named)
def test_a_bundle_infers_learns_from_one_and_from_two_labels_and_is_reloaded(
    server: Server, bundle: Bundle, tmp_path: Path
) -> None:
    images = sorted(path.name.removesuffix(".nii.gz") for path in (server.phantoms / "imagesTr").iterdir())
    model = server.models / bundle.name / "models" / "model.pt"
    classes = bundle.classes

    def check(found: nib.Nifti1Image, image: str) -> np.ndarray:
        source = nib.load(server.phantoms / "imagesTr" / f"{image}.nii.gz")
        assert found.shape == source.shape
        np.testing.assert_allclose(found.affine, source.affine, atol=1e-4)
        values = np.asarray(found.dataobj)
        assert set(np.unique(values)) <= set(range(len(classes) + 1))
        return values

    for image in images:
        for held in json.loads(server.call("GET", "/datastore/?output=train")):
            if held["image"].endswith(f"{image}.nii.gz"):
                server.call("DELETE", f"/datastore/label?id={image}&tag=final")
    seen = [check(server.infer(bundle, images[0], tmp_path), images[0])]
    states = [digest(model)]
    for count, (image, val_split) in enumerate(zip(images, (0.2, -1), strict=True), 1):
        server.submit(image, label_for(bundle, server.phantoms, image, tmp_path), classes)
        assert len(json.loads(server.call("GET", "/datastore/?output=train"))) == count
        server.train(bundle, max_epochs=count, val_split=val_split)
        states.append(digest(model))
        seen.append(check(server.infer(bundle, images[0], tmp_path), images[0]))
    assert len(set(states)) == 3, "a training left model.pt as it was"
    written = set(state_in(model))
    flow = bundle.workflow("inference", model.parents[1], tmp_path)
    assert written == set(parsed(flow, "network_def").state_dict())
    write_network(bundle, model.parents[1], seed=1)  # few steps may leave every voxel's class as it was; this does not
    other = check(server.infer(bundle, images[0], tmp_path), images[0])
    assert (other != seen[-1]).any(), "the server still answers with the weights before"
    assert sorted(path.name for path in model.parent.glob("*.pt")) == ["model.pt"]
    assert list((model.parent / "adapters").glob("*.safetensors"))
    assert not re.search(r"keys don't match", server.log.read_text(encoding="utf-8", errors="replace"))
    assert rows_in(REPOSITORY / "docs" / "bundles.md").get(bundle.name, {}).get("MONAI Label", "yes") == "yes"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
