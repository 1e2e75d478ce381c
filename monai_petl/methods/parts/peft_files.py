"""LoRA adapters to and from the files of the peft library, without that library.

A folder holds ``adapter_model.safetensors`` (factors, under the names of the layers) and ``adapter_config.json`` (scale and
options). Format: https://huggingface.co/docs/peft, read and written by version 0.21.2.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from monai_petl.core.adapt import attach, restored_on_error
from monai_petl.core.adapters import AdapterFileError
from monai_petl.core.deltas import Delta, deltas_of
from monai_petl.core.frozen import keep_frozen
from monai_petl.core.records import AdapterRecord, adapters_of, find_record
from monai_petl.core.roles import CONVOLUTIONS, PRESETS, ROLES, TRANSPOSED
from monai_petl.files.atomic import all_written_whole
from monai_petl.files.json_files import read_object
from monai_petl.files.tensor_files import save_tensors
from monai_petl.methods.lora import LoRA
from monai_petl.methods.parts.lora_layers import DoRADelta, FusedLoRA
from monai_petl.methods.parts.quick_patterns import require_quick

__all__ = ["export_peft", "import_peft"]

TENSORS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
A, B, LENGTHS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
OPTIONS = (
    *("peft_type", "lora_alpha", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora"),
    # these do not change the function, given the tensors
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
)
VALUES = {"bias": ("none", None), "init_lora_weights": (True, False, "gaussian", None)}


def export_peft(network: nn.Module, folder: str | os.PathLike, name: str | None = None) -> Path:
    """Write a LoRA adapter as peft does; ``PeftModel.from_pretrained(backbone, folder)`` then computes the same.

    The factors of q and v in a fused projection become those of a plain adapter on the whole projection, of n times the
    rank and of n times the alpha: A stacked, B with blocks of zeros. The scale of rsLoRA is written as the alpha that gives it.

    Args:
        network: a network with a LoRA adapter on linear layers and convolutions.
        folder: where to write; it is made if it is missing. Both files appear whole or not at all.
        name: which adapter; default the one attached last.

    Returns:
        The folder.

    Raises:
        ValueError: there is no such adapter, it is merged or switched off, or peft cannot express it: other methods, tensors of
            the backbone that train besides, transposed, grouped or dilated convolutions, padding other than zeros.
        OSError: the place cannot be written to.
    """
    name, record = find_record(network, name)
    _refuse_what_is_more_than_lora(network, name, record)
    tensors: dict[str, Tensor] = {}
    ranks, alphas, dora = {}, {}, False
    for layer_name, layer, delta in _layers(network, name):
        if reason := _reason_against(layer):
            raise ValueError(
                f"{layer_name} is {reason}, for which peft has no adapter that computes the same. Leave it out with "
                f"LoRA(exclude=[{layer_name!r}]), or use save_adapter"
            )
        dora = isinstance(delta, DoRADelta)
        factors: Any = delta.factors if isinstance(delta, DoRADelta) else delta
        if isinstance(factors, FusedLoRA):
            a, b = factors.A.flatten(0, 1), factors.up()
        else:
            a, b = factors.A.weight, factors.B.weight
        tensors |= {f"{PREFIX}{layer_name}.{A}": a, f"{PREFIX}{layer_name}.{B}": b}
        if isinstance(delta, DoRADelta):
            tensors[f"{PREFIX}{layer_name}.{LENGTHS}"] = delta.lengths().view(_shape_of_lengths(layer))
        ranks[layer_name], alphas[layer_name] = len(a), round(factors.scale * len(a), 9)
    dropout = next(m.dropout for m in record.methods if isinstance(m, LoRA))
    return _write(Path(folder), tensors, _config(ranks, alphas, dropout, dora))


def import_peft(
    network: nn.Module, folder: str | os.PathLike, name: str = "default", trainable: bool = False
) -> nn.Module:
    """Attach a LoRA adapter that peft (or :func:`export_peft`) wrote, to the backbone that it was trained on.

    It becomes a ``LoRA`` on the layers that the file names, with their ranks and alphas, and one A for each (``shared_a``).
    The file says nothing of the backbone's weights: they are not checked.

    Args:
        network: the backbone; its other adapters stay as they are.
        folder: with ``adapter_model.safetensors`` and ``adapter_config.json``.
        name: the adapter's name on this network.
        trainable: whether the adapter is to be trained further.

    Returns:
        The same network. After an error it is as it was.

    Raises:
        FileNotFoundError: a file is missing.
        AdapterFileError: a file is damaged, is of another method, has an option that is not known here, names layers that the
            network has not got, or tensors of another shape.
        ValueError: the network has an adapter of that name.
    """
    folder = Path(folder)
    config, factors = _read_config(folder / CONFIG), _read_tensors(folder / TENSORS)
    modules = dict(network.named_modules())
    missing = [n for n in factors if n not in modules]
    if missing:
        raise AdapterFileError(
            f"{folder} does not fit: {len(missing)} of its {len(factors)} layers are missing in this "
            f"{type(network).__name__}, such as {missing[0]}"
        )
    for n, tensors in factors.items():
        _check_tensors(folder, n, modules[n], tensors, bool(config.get("use_dora")))
    try:
        alpha = float(config["lora_alpha"])
        alphas = {n: _alpha_of(n, config) for n in factors}
        method = LoRA(
            alpha=alpha,
            targets=[_pattern(n) for n in factors],
            dropout=config.get("lora_dropout") or 0.0,
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            shared_a=True,
            rank_pattern={n: len(tensors[A]) for n, tensors in factors.items()},
            alpha_pattern={n: a for n, a in alphas.items() if a != alpha},
        )
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise AdapterFileError(f"{folder / CONFIG} is damaged ({type(error).__name__}: {error})") from error
    with restored_on_error(network):
        if not adapters_of(network):  # a network that is given an adapter is a backbone from now on
            network.requires_grad_(False)
        try:
            attach(network, [method], (), name)
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
            if name in adapters_of(network):
                raise
            raise AdapterFileError(f"{folder} cannot be attached to this {type(network).__name__}: {error}") from error
    with torch.no_grad():
        for layer_name, _, delta in _layers(network, name):
            tensors = factors[layer_name]
            own: Any = delta.factors if isinstance(delta, DoRADelta) else delta
            own.A.weight.copy_(tensors[A])
            own.B.weight.copy_(tensors[B])
            if isinstance(delta, DoRADelta):
                delta.magnitude.copy_(tensors[LENGTHS].flatten())
            delta.requires_grad_(trainable)
    keep_frozen(network)
    return network


def _refuse_what_is_more_than_lora(network: nn.Module, name: str, record: AdapterRecord) -> None:
    merged = [n for n, r in adapters_of(network).items() if r.merged]
    if merged:
        raise ValueError(f"adapter {merged[0]!r} is merged; call unmerge(network, {merged[0]!r}) before exporting")
    if not record.enabled:
        raise ValueError(f"adapter {name!r} is switched off; call activate(network, {name!r}) before exporting")
    besides = [type(m).__name__ for m in record.methods if not isinstance(m, LoRA)] + list(record.originals)
    if besides:
        raise ValueError(
            f"adapter {name!r} trains {besides[0]} too, and a peft file holds low-rank factors alone. save_adapter writes "
            "adapters of every kind"
        )
    if len({isinstance(delta, DoRADelta) for _, _, delta in _layers(network, name)}) > 1:
        raise ValueError(f"adapter {name!r} has DoRA on some layers only, for which peft has no option")


def _layers(network: nn.Module, name: str) -> list[tuple[str, nn.Module, Delta]]:
    """The adapted layers with their names and deltas."""
    names = {module: n for n, module in network.named_modules()}
    return [(names[layer], layer, delta) for layer, delta in deltas_of(network, name)]


def _reason_against(layer: nn.Module) -> str:
    """Why peft and this library would not compute the same on a layer; nothing when they do."""
    convolution: Any = layer
    if isinstance(layer, nn.Linear):
        return ""
    if isinstance(layer, TRANSPOSED):
        return "a transposed convolution"
    if not isinstance(layer, CONVOLUTIONS):
        return f"of the kind {type(layer).__name__}"
    if convolution.groups > 1:
        return f"a convolution in {convolution.groups} groups"
    if set(convolution.dilation) != {1}:
        return "a dilated convolution"
    return "" if convolution.padding_mode == "zeros" else f"a convolution with {convolution.padding_mode} padding"


def _check_tensors(folder: Path, name: str, layer: nn.Module, tensors: Mapping[str, Tensor], dora: bool) -> None:
    if reason := _reason_against(layer):
        raise AdapterFileError(f"{folder}: {name} is {reason} here, on which peft's factors cannot be used")
    needed = {A, B, LENGTHS} if dora else {A, B}
    if set(tensors) != needed:
        raise AdapterFileError(
            f"{folder} has {', '.join(sorted(tensors))} for {name}, needed are {', '.join(sorted(needed))}"
        )
    outputs, inputs, *kernel = layer.get_parameter("weight").shape
    rank = len(tensors[A])
    wanted = {A: [rank, inputs, *kernel], B: [outputs, rank, *[1] * len(kernel)], LENGTHS: _shape_of_lengths(layer)}
    for n, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise AdapterFileError(f"{folder}: {n} of {name} does not hold finite numbers. Copy or export it again")
        if list(tensor.shape) != wanted[n]:
            raise AdapterFileError(
                f"{folder} does not fit: {n} of {name} has shape {list(tensor.shape)}, the network needs {wanted[n]}"
            )


def _shape_of_lengths(layer: nn.Module) -> list[int]:
    weight = layer.get_parameter("weight")
    return [len(weight)] if weight.ndim == 2 else [1, len(weight), *[1] * (weight.ndim - 2)]


def _alpha_of(name: str, config: Mapping[str, Any]) -> float:
    """The first pattern that matches the end of the name, from the beginning of a word of it, counts."""
    patterns = config.get("alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        require_quick(pattern)
        if re.fullmatch(rf"(.*\.)?(?:{pattern})", name):
            return float(alpha)
    return float(config["lora_alpha"])


def _pattern(name: str) -> str:
    """A pattern for this layer alone, also when it is called like a role."""
    return f"[{name[0]}]{name[1:]}" if name in ROLES or name in PRESETS else name


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float], dropout: float, dora: bool) -> dict[str, Any]:
    """What peft needs to know; the first layer's rank and alpha are the common ones."""
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{n}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{n}": a for n, a in alphas.items() if a != alpha},
        "target_modules": "|".join(map(re.escape, ranks)),  # as a list, the ends of other names would match too
        "lora_dropout": dropout,
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter of peft: {path} is missing")
    config = read_object(path, "Copy or export it again", AdapterFileError)
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(f"{path} is of the method {config.get('peft_type')}; only LORA is read here")
    for option, value in config.items():
        known = value in VALUES[option] if option in VALUES else option in OPTIONS or not value
        if not known:
            raise AdapterFileError(f"{path} has the option {option} = {value!r}, which is not read here")
    return config


def _read_tensors(path: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and by what they are."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no adapter of peft: {path} is missing (files of pickle, adapter_model.bin, are not read)"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is damaged: {error}. Copy or export it again") from error
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, (A, B, LENGTHS)))})", key)
        if not match:
            raise AdapterFileError(
                f"{path} has the tensor {key}, which is no low-rank factor of a linear layer or convolution"
            )
        factors.setdefault(match[1], {})[match[2]] = tensor
    if not factors:
        raise AdapterFileError(f"{path} is empty")
    return factors


def _write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Both files are complete before the first of them is moved to its place."""
    with all_written_whole(folder, "the adapter", sum(tensor.nbytes for tensor in tensors.values())) as part:
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_tensors(part / TENSORS, tensors, {"format": "pt"})
    return folder
