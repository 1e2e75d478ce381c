"""Dictionary transforms that MONAI has not got."""

from __future__ import annotations

from monai_petl.transforms.channels import ToChannelsd
from monai_petl.transforms.checks import RequireContentd
from monai_petl.transforms.class_label import SampleClassLabeld
from monai_petl.transforms.coordinates import AddCoordinatesd
from monai_petl.transforms.features import LoadFeaturesd
from monai_petl.transforms.intensities import scale_intensity
from monai_petl.transforms.labels import SelectClassesd
from monai_petl.transforms.spacing import GuardedSpacingd
from monai_petl.transforms.views import RandViewd, StudentTeacherViewsd, ViewAugmentation
from monai_petl.transforms.whole_labels import WholeLabelsd

__all__ = [
    "AddCoordinatesd",
    "GuardedSpacingd",
    "LoadFeaturesd",
    "RandViewd",
    "RequireContentd",
    "SampleClassLabeld",
    "SelectClassesd",
    "StudentTeacherViewsd",
    "ToChannelsd",
    "ViewAugmentation",
    "WholeLabelsd",
    "scale_intensity",
]
