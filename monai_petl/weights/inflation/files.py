"""2D checkpoints from files, folders and the Hugging Face hub; inflated networks as files that say how they were made."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import WindowAttention
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from monai_petl.core.adapter_file import versions
from monai_petl.files.tensor_files import log_left_out, write_tensors
from monai_petl.files.torch_files import TorchFileError, read_torch
from monai_petl.networks.vit.attention_bias import add_attention_bias
from monai_petl.networks.vit.backbone import set_eps
from monai_petl.weights.inflation.inflate import merging_of

__all__ = ["Checkpoint", "StateSource", "load_inflated", "read_checkpoint", "save_inflated"]

FORMAT, FORMAT_VERSION = "monai_petl.weights.inflation", 1
NAMES = ("model.safetensors", "pytorch_model.bin")
StateSource = str | os.PathLike | Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors, and the ``config.json`` beside them when the source is a folder or comes from the hub."""

    state: Mapping[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(source: StateSource) -> Checkpoint:
    """Read a 2D checkpoint; no code in it is executed.

    Args:
        source: a ``.safetensors`` or torch file, a folder of Hugging Face, the name of a repository there
            (``facebook/dinov2-small``, needs ``huggingface_hub``), or a state dict.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: the file is damaged, holds code, or is no state dict; or the hub cannot be asked.
    """
    if isinstance(source, Mapping):
        return Checkpoint(source)
    path = Path(source)
    if not path.exists():
        path = _download(str(source))
    config: dict[str, Any] = {}
    if path.is_dir():
        files = [path / name for name in NAMES if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(f"no {' or '.join(NAMES)} in {path}. Give the checkpoint's file itself")
        path = files[0]
    if path.name in NAMES and (path.parent / "config.json").is_file():
        config = _read_config(path.parent / "config.json")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return Checkpoint(state, config)


def save_inflated(network: nn.Module, path: str | os.PathLike, notes: Mapping[str, Any]) -> Path:
    """Write a network's state dict to a ``.safetensors`` file, whole or not at all.

    Args:
        network: as a builder returns it.
        path: where to write; missing folders are made.
        notes: how it was made, kept in the header: arguments, mode, source.

    Raises:
        OSError: the place cannot be written to.
    """
    hook = getattr(network.blocks[0].attn, "rel_positional_embedding", None) if isinstance(network, ViT) else None
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "network": type(network).__name__,
        "downsample": merging_of(network) or "",
        "eps": json.dumps(next((m.eps for m in network.modules() if isinstance(m, nn.LayerNorm | _BatchNorm)), None)),
        "num_heads": json.dumps(_heads(network)),
        "bias_grid": json.dumps(getattr(hook, "grid", None)),
        "notes": json.dumps(notes, default=str),
        "versions": json.dumps(versions()),
    }
    return write_tensors(path, network.state_dict(), header, "the network")


def load_inflated(network: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load a file of :func:`save_inflated` into a freshly built MONAI network of the same settings.

    Sets the epsilon of the layer norms, and adds the attention biases that the file holds.

    Args:
        network: changed in place.
        path: the file.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, another network, or a patch merging of the other order; names what differs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no inflated network at {path}. Make one: python -m monai_petl inflate SOURCE {path} ..."
        )
    header, state = _open_safetensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by save_inflated. Use load_pretrained for 2D checkpoints")
    if header["network"] != type(network).__name__:
        raise ValueError(
            f"{path} holds a {header['network']}, the network is a {type(network).__name__}. Build that class"
        )
    merging = merging_of(network) or ""
    if header["downsample"] != merging:
        raise ValueError(
            f"{path} was made for downsample={header['downsample'] or 'none'!r}, the network has {merging or 'none'!r}: the "
            f"shapes agree but the order of values does not. Build it with downsample={header['downsample']!r}"
        )
    if (heads := json.loads(header.get("num_heads", "null"))) not in (None, _heads(network)):
        raise ValueError(
            f"{path} has {heads} heads in its blocks, the network {_heads(network)}. Build it with num_heads of the file"
        )
    own = network.state_dict()
    hooks = {n for n in state if ".rel_positional_embedding." in n and n not in own and isinstance(network, ViT)}
    wrong = [n for n in own if n not in state or state[n].shape != own[n].shape]
    wrong += [n for n in state if n not in own and n not in hooks]
    if wrong:
        raise ValueError(
            f"{path} does not fit this {type(network).__name__}: {len(wrong)} tensors are missing, left over or of another "
            f"shape ({', '.join(wrong[:3])}). It was made with {json.loads(header['notes'])}"
        )
    if hooks and isinstance(network, ViT):
        grid = json.loads(header["bias_grid"])
        heads = network.blocks[0].attn.num_heads
        add_attention_bias(network, "table" if grid else "class_key", grid or (), heads)
    network.load_state_dict(state)
    if (eps := json.loads(header["eps"])) is not None:
        set_eps(network, eps)
    return network


def _heads(network: nn.Module) -> list[int] | None:
    """Heads of every attention of a network that has such, which shapes do not tell."""
    return [m.num_heads for m in network.modules() if isinstance(m, SABlock | WindowAttention)] or None


def _open_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        return header, load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no safetensors file, or it is truncated: {error}. Copy or download it again"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    header, state = _open_safetensors(path)
    if header.get("format") == FORMAT:
        raise ValueError(f"{path} is inflated already. Load it with monai_petl.inflation.load_inflated")
    return state


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Download it again, or move it away") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings by name. Download it again, or move it away")
    return config


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = read_torch(path)
    except TorchFileError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds objects other than tensors, which are not loaded because they can run code. Save "
            "the model's state_dict() alone, best as .safetensors"
        ) from error
    except Exception as error:  # torch's reader raises errors of many kinds for bytes that are no file of its own
        first = str(error).splitlines()[0] if str(error) else "it ends early"
        raise ValueError(
            f"{path} is no file of torch.save, or it is truncated ({type(error).__name__}: {first}). Copy or download it again"
        ) from error
    for name in ("state_dict", "model", "teacher"):  # where training scripts put it
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            log_left_out(path, state, name)
            state = state[name]
    if not isinstance(state, Mapping) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()
    ):
        raise ValueError(f"{path} holds no state dict. Save model.state_dict(), best as .safetensors")
    return dict(state)


def _download(name: str) -> Path:
    """The local folder of a repository of the hub, fetched when it is not there."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).suffix in (".safetensors", ".pt", ".pth", ".bin"):
        raise FileNotFoundError(
            f"no checkpoint at {name}. Give a file, a folder or the name of a Hugging Face repository"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"there is no file {name}; to download the repository of that name: pip install huggingface_hub"
        ) from error
    try:
        for pattern in NAMES:
            folder = Path(snapshot_download(name, allow_patterns=[pattern, "config.json"]))
            if (folder / pattern).is_file():
                return folder
    except Exception as error:  # the client raises errors of several libraries
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot download {name} from the Hugging Face hub: {first}") from error
    raise FileNotFoundError(
        f"the repository {name} has no {' or '.join(NAMES)}. Download the checkpoint and give its file"
    )
