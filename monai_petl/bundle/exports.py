"""A bundle's network in the forms that it is deployed in: each works, and equals the network, where the model card says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ckpt_export, onnx_export
from torch import Tensor

from monai_petl.bundle.checks import CheckError, SkippedError
from monai_petl.bundle.trials import Trial

__all__ = ["EXPORTS"]


def try_scripted(trial: Trial) -> None:
    """TorchScript by scripting, where the model card says so."""
    _export(trial, "TorchScript scripted", lambda path, weights: _monai_export(trial, path, weights))


def try_traced(trial: Trial) -> None:
    """TorchScript by tracing, for batches of any size."""
    shape = list(trial.bundle.input_shape)
    _export(
        trial,
        "TorchScript traced",
        lambda path, weights: _monai_export(trial, path, weights, use_trace=True, input_shape=shape),
    )


def try_export(trial: Trial) -> None:
    """``torch.export`` with a dynamic batch."""

    def make(path: Path, weights: Path) -> Callable[[Tensor], Tensor]:
        example = torch.rand(2, *trial.bundle.input_shape[1:])
        dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
        torch.export.save(torch.export.export(trial.network, (example,), dynamic_shapes=dynamic), path)
        return torch.export.load(path).module()

    _export(trial, "torch.export", make)


def try_onnx(trial: Trial) -> None:
    """ONNX, run by onnxruntime."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise SkippedError(f"needs {', '.join(missing)}: the extra 'export'")

    def make(path: Path, weights: Path) -> Callable[[Tensor], Tensor]:
        import onnxruntime

        shape, files = list(trial.bundle.input_shape), trial.files()
        sizes = trial.bundle.sizes("inference")
        onnx_export("network_def", str(path), str(weights), input_shape=shape, use_trace=True, **files, **sizes)
        session = onnxruntime.InferenceSession(path)
        name = session.get_inputs()[0].name
        return lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0])

    _export(trial, "ONNX", make, batches=(1,), tolerance=1e-3)


EXPORTS = {
    "TorchScript scripted": try_scripted,
    "TorchScript traced": try_traced,
    "torch.export": try_export,
    "ONNX": try_onnx,
}


def _export(
    trial: Trial,
    kind: str,
    make: Callable[[Path, Path], Callable[[Tensor], Tensor]],
    batches: tuple[int, ...] = (1, 3),
    tolerance: float = 1e-4,
) -> None:
    """The export works where the card says yes, and equals the network; it fails where the card says no."""
    claimed, network = trial.source.claims().get(kind), trial.network
    folder = trial.scratch / kind
    folder.mkdir()
    torch.save(network.state_dict(), folder / "model.pt")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = make(folder / "exported", folder / "model.pt")
    except Exception as error:
        if claimed:
            raise CheckError(
                f"the card says yes, and it ends in {type(error).__name__}: {_first_line(error)}"
            ) from error
        raise SkippedError("the card says no") from error
    if not claimed:
        raise CheckError("it works, and the card does not say so")
    with torch.no_grad():
        for count in batches:
            image = torch.rand(count, *trial.bundle.input_shape[1:])
            given, wanted = exported(image), network(image)
            if given.shape != wanted.shape:
                raise CheckError(f"it gives {tuple(given.shape)} where the network gives {tuple(wanted.shape)}")
            difference = (given - wanted).abs().max().item()
            if not difference <= tolerance:
                raise CheckError(f"it differs from the network by {difference:.1e} for a batch of {count}")


def _monai_export(trial: Trial, path: Path, weights: Path, **options: Any) -> Callable[[Tensor], Tensor]:
    path = path.with_suffix(".ts")
    sizes = trial.bundle.sizes("inference")
    ckpt_export("network_def", str(path), str(weights), **trial.files(), **options, **sizes)
    return torch.jit.load(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
