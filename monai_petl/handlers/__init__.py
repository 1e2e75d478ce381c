"""Ignite handlers that MONAI has not got."""

from monai_petl.handlers.adapter_saver import AdapterSaver
from monai_petl.handlers.checkpoint_saver import CheckpointSaver
from monai_petl.handlers.class_mean import ClassMean
from monai_petl.handlers.clip import GradientClipping, GradientNormClipping
from monai_petl.handlers.confusion import BalancedAccuracy, CohenKappa, MacroF1
from monai_petl.handlers.finite_loss import FiniteLoss
from monai_petl.handlers.metrics_saver import MetricsSaver
from monai_petl.handlers.probability_table import ProbabilityTable
from monai_petl.handlers.ranks import for_this_rank, leave_group
from monai_petl.handlers.resume import BestMetric, ResumableTraining, require_checkpoint

__all__ = [
    "AdapterSaver",
    "BalancedAccuracy",
    "BestMetric",
    "CheckpointSaver",
    "ClassMean",
    "CohenKappa",
    "FiniteLoss",
    "GradientClipping",
    "GradientNormClipping",
    "MacroF1",
    "MetricsSaver",
    "ProbabilityTable",
    "ResumableTraining",
    "for_this_rank",
    "leave_group",
    "require_checkpoint",
]
