"""Seconds and memory of building a 3D network from a 2D checkpoint of the size of ViT-B, against reading the file alone.

python benchmarks/inflation.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import fire
import torch
from common import markdown, report
from monai.networks.nets import ViT
from peak_memory import peak_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from monai_petl.inflation import save_inflated, vit_from_pretrained

IMAGE = (224, 224, 5)


def main(repeats: int = 5) -> None:
    """Measure and report.

    Args:
        repeats: processes of each kind; they take turns.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {"timm": Path(folder) / "timm.safetensors", "Hugging Face": Path(folder) / "hf.safetensors"}
        save_file(timm_vit_b(), files["timm"])
        save_file(split_names(timm_vit_b()), files["Hugging Face"])
        cases = {
            f"{names}, {what}": [what, str(path)]
            for names, path in files.items()
            for what in ("read", "build", "center", "average", "write")
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, arguments in cases.items():
                command = [sys.executable, __file__, "once", *arguments]
                output = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
                runs[name].append(json.loads(output.splitlines()[-1]))
        size = files["timm"].stat().st_size
    rows, record = [], {}
    for name, measured in runs.items():
        seconds = median(run["seconds"] for run in measured)
        times = max(run["bytes"] for run in measured) / size
        record[name] = {"seconds": seconds, "times_the_file": times}
        rows.append((name, f"{seconds:.2f}", f"{times:.2f}"))
    slowest = max(r["seconds"] for r in record.values())
    largest = max(r["times_the_file"] for r in record.values())
    report(
        "inflation",
        [markdown(["ViT-B/16 to windows of 5 slices", "s", "memory, x file"], rows)],
        f"Reading, converting and inflating a file of {size / 1e6:.0f} MB takes at most {slowest:.1f} s (the target is 5) and "
        f"{largest:.2f} times its size in memory, network included (the target is 2.5).",
        {"file_bytes": size, "runs": runs, "measured": record},
    )


def once(what: str, path: str) -> None:
    """Print seconds and bytes of one kind of work in this process.

    Args:
        what: ``read`` and copy the file (the floor), ``build`` a ViT-B with random weights, an inflation mode, or ``write`` an
            inflated network beside the checkpoint.
        path: the checkpoint.
    """
    torch.set_num_threads(1)
    before, start = peak_bytes(), time.perf_counter()
    if what == "read":
        kept: Any = {name: tensor.clone() for name, tensor in load_file(path).items()}
    elif what == "build":
        kept = ViT(1, IMAGE, (16, 16, 5), classification=True, qkv_bias=True)
    else:
        mode = "average" if what == "average" else "center"
        kept = vit_from_pretrained(path, spatial_dims=3, img_size=IMAGE, in_channels=1, mode=mode)
        if what == "write":
            save_inflated(kept, Path(path).with_name("written.safetensors"), {})
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": peak_bytes() - before, "kept": bool(kept)}))


def timm_vit_b(width: int = 768, layers: int = 12) -> dict[str, Tensor]:
    """Random tensors under timm's names."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in range(layers):
        for name, (rows, columns) in linear.items():
            shapes[f"blocks.{block}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{block}.{name}.bias"] = (rows * width,)
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.weight": (width,), f"blocks.{block}.{norm}.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def split_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network under Hugging Face's names, whose queries, keys and values are apart."""
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "blocks": "encoder.layer",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = "layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name
        for old, other in names.items():
            new = new.replace(old, other)
        if "attn.qkv" in new:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[new.replace("attn.qkv", f"attention.attention.{part}")] = third.clone()
        else:
            renamed[new] = tensor
    return renamed


if __name__ == "__main__":
    fire.Fire({"once": once}) if sys.argv[1:2] == ["once"] else fire.Fire(main)
