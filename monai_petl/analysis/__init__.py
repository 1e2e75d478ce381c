"""What tuning does to features: separation of classes, norms of tokens, calibration, pictures."""

from monai_petl.analysis.handler import FeatureSeparation
from monai_petl.analysis.plots import plot_features, plot_gates, plot_norms
from monai_petl.analysis.separation import (
    Scatter,
    Separation,
    Spread,
    linear_cka,
    nearest_centroid_accuracy,
    principal_axes,
    scatter,
    separation,
    spread,
)
from monai_petl.analysis.tokens import (
    ScalingConditions,
    expected_calibration_error,
    outliers,
    scaling_conditions,
    token_norms,
)

__all__ = [
    "FeatureSeparation",
    "ScalingConditions",
    "Scatter",
    "Separation",
    "Spread",
    "expected_calibration_error",
    "linear_cka",
    "nearest_centroid_accuracy",
    "outliers",
    "plot_features",
    "plot_gates",
    "plot_norms",
    "principal_axes",
    "scaling_conditions",
    "scatter",
    "separation",
    "spread",
    "token_norms",
]
