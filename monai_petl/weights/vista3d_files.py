"""Checkpoints of VISTA3D, under the names of MONAI 1.4 and of its first release.

Y. He et al., VISTA3D, arXiv:2406.05285 (2024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from monai.networks.nets import SegResNetDS2
from monai.networks.nets.vista3d import VISTA3D, ClassMappingClassify, PointMappingSAM
from torch import Tensor, nn

from monai_petl.weights.family import Family, Published, blocks_of

__all__ = ["VISTA3DFiles"]

MARK = "image_encoder.encoder.conv_init.weight"
CLASSES = "class_head.class_embeddings.weight"


class VISTA3DFiles(Family):
    """``vista3d132`` and networks of its kind in other sizes."""

    title = "VISTA3D"
    inputs = (MARK,)
    published = (
        Published(
            "VISTA3D, NV-Segment-CT",
            "11,454 CT, 132 classes",
            "NVIDIA Open Model License",
            "github.com/Project-MONAI/VISTA",
        ),
        Published("NV-Segment-CTMR", "CT and MR", "NVIDIA non-commercial", "github.com/Project-MONAI/VISTA"),
    )
    reasons: ClassVar[dict[str, str]] = {
        r"output_add_hypernetworks_mlps|weight_mapper": "branch of the first release that MONAI's class does not have",
    }

    def names(self, tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
        prefix = next((n[: -len(MARK)] for n in tensors if n.endswith(MARK)), None)
        if prefix is None or prefix + CLASSES not in tensors:
            return None
        found = {}
        for name in tensors:
            if name.startswith(prefix) and self.left_out(name).startswith("no tensor"):
                plain = re.sub(r"(transformer\.layers\.\d+\.mlp)\.lin([12])\.", r"\1.linear\2.", name[len(prefix) :])
                found[name] = plain
        return found

    def arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        classes, width = tensors[CLASSES].shape
        return {
            "in_channels": tensors[MARK].shape[1],
            "encoder_embed_dim": width,
            "blocks_down": tuple(blocks_of(tensors, r"image_encoder\.encoder\.layers\.(\d+)\.blocks\.(\d+)\.")),
            "n_classes": classes,
            "last_supported": 132,
            "use_mlp": any(name.startswith("class_head.mlp.") for name in tensors),
        }

    def build(self, **arguments: Any) -> nn.Module:
        width, classes = arguments["encoder_embed_dim"], arguments["n_classes"]
        encoder = SegResNetDS2(
            in_channels=arguments["in_channels"],
            blocks_down=arguments["blocks_down"],
            norm="instance",
            out_channels=width,
            init_filters=width,
            dsdepth=1,
        )
        points = PointMappingSAM(feature_size=width, n_classes=classes, last_supported=arguments["last_supported"])
        prompts = ClassMappingClassify(n_classes=classes, feature_size=width, use_mlp=arguments["use_mlp"])
        return VISTA3D(image_encoder=encoder, class_head=prompts, point_head=points)
