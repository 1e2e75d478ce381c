"""Checkpoints of ``SwinUNETR``: whole ones, NVIDIA's self-supervised ones, SuPreM, CLIP-driven, VoCo, VoComni, BrainSegFounder.

Y. Tang et al., arXiv:2111.14791 (2022); W. Li et al., SuPreM (2024); L. Wu et al., VoCo, arXiv:2402.17300 (2024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from monai.networks.nets import SwinUNETR
from torch import Tensor, nn

from monai_petl.weights.family import Family, Published, blocks_of

__all__ = ["SwinUNETRFiles"]

MARK = re.compile(
    r"(?P<prefix>.*?)(?P<swin>(swinViT|swin_vit|encoder)\.)?layers1\.0\.(0\.)?blocks\.0\.attn\.qkv\.weight$"
)
OUTSIDE = re.compile(r"(encoder(1|2|3|4|10)|decoder[1-5]|out)\.")
OF_SWIN = re.compile(r"(patch_embed|layers[1-4]c?)\.")
RECONSTRUCTS, PATCHES = "mask_token", "swinViT.patch_embed.proj.weight"
PRETEXT = "head of the pre-training task"


class SwinUNETRFiles(Family):
    """All layouts of a ``SwinUNETR``; ``use_v2``, widths and depths follow from the tensors."""

    title = "SwinUNETR"
    inputs = (PATCHES, "encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight")
    head = ("out.",)
    published = (
        Published(
            "NVIDIA self-supervised (5,050)",
            "5,050 CT",
            "Apache-2.0",
            "github.com/Project-MONAI/research-contributions",
        ),
        Published(
            "NVIDIA self-supervised (50,000)",
            "50,000 CT",
            "Apache-2.0",
            "github.com/Project-MONAI/research-contributions",
        ),
        Published(
            "SuPreM",
            "2,100 CT, 25 organs",
            "CC BY-NC-ND 4.0: no commercial use, no derivatives",
            "github.com/MrGiovanni/SuPreM",
        ),
        Published(
            "CLIP-driven universal model",
            "3,410 CT, 25 organs and 6 tumours",
            "CC BY-NC-ND 4.0: no commercial use, no derivatives",
            "github.com/ljwztc/CLIP-Driven-Universal-Model",
        ),
        Published("VoCo and VoComni (B, L, H)", "160,000 CT", "Apache-2.0", "github.com/Luffy03/Large-Scale-Medical"),
        Published("BrainSegFounder", "MR of UK Biobank, 2 channels", "GPL-3.0", "github.com/lab-smile/BrainSegFounder"),
    )
    reasons: ClassVar[dict[str, str]] = {
        r"(rotation_head|contrastive_head)\.": PRETEXT,
        r"out\.conv\.conv\.": "reconstruction head of the pre-training",
        r"(^|\.)conv\.\d*\.?(weight|bias)$": PRETEXT,
        r"(^|\.)(student|teacher)\.": "projection head of the pre-training",
        r"mask_token$": "mask token of the pre-training",
        r"encoder\.norm\.|(^|\.)norm\.(weight|bias)$": "final norm of the pre-training, which swinViT does not have",
        r"(organ_embedding|precls_conv|controller|text_to_vision|GAP)": "head that is conditioned on classes",
    }

    def names(self, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
        mark = next((match for name in tensors if (match := MARK.match(name))), None)
        if mark is None:
            return None
        prefix, swin = mark["prefix"], mark["swin"] or ""
        found: dict[str, str] = {}
        for name in tensors:
            if not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            inside = rest.removeprefix(swin) if rest.startswith(swin) else ""
            if OF_SWIN.match(inside):
                plain = re.sub(r"^(layers\dc?\.0\.)0\.", r"\1", inside)
                found[name] = "swinViT." + plain.replace(".mlp.fc1.", ".mlp.linear1.").replace(
                    ".mlp.fc2.", ".mlp.linear2."
                )
            elif OUTSIDE.match(rest) and not self._reconstructs(rest, tensors):
                found[name] = rest
        return found

    def arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        patches = tensors[PATCHES]
        form = r"swinViT\.layers(\d)\.0\.blocks\.(\d+)\."
        depths = blocks_of(tensors, form)
        table = "swinViT.layers{}.0.blocks.0.attn.relative_position_bias_table"
        told: dict[str, Any] = {
            "in_channels": patches.shape[1],
            "feature_size": patches.shape[0],
            "depths": tuple(depths),
            "num_heads": tuple(tensors[table.format(i + 1)].shape[1] for i in range(len(depths))),
            "spatial_dims": patches.ndim - 2,
            "use_v2": any(name.startswith("swinViT.layers1c.") for name in tensors),
        }
        if "out.conv.conv.weight" in tensors:
            told["out_channels"] = tensors["out.conv.conv.weight"].shape[0]
        return told

    def build(self, **arguments: Any) -> nn.Module:
        if "out_channels" not in arguments:
            raise TypeError("give out_channels, the number of classes with the background")
        return SwinUNETR(**arguments)

    def anew(self, missing: Sequence[str]) -> dict[str, str]:
        groups = {name.split(".")[0] for name in missing}
        decoder = {f"decoder{i}" for i in range(1, 6)} | {"out"}
        encoder = {f"encoder{i}" for i in (1, 2, 3, 4, 10)}
        known = {
            frozenset({"out"}): "the file has no head for classes",
            frozenset(decoder): "the file has no decoder",
            frozenset(decoder | encoder): "the file has the transformer alone",
        }
        why = known.get(frozenset(groups))
        return dict.fromkeys(missing, why) if why else {}

    def _reconstructs(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        return name.startswith("out.") and any(other.endswith(RECONSTRUCTS) for other in tensors)
