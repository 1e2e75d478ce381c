"""2D pre-trained weights in MONAI networks, 2D or 3D: the public name of :mod:`monai_petl.weights.inflation`."""

from monai_petl.weights.inflation import *  # noqa: F403
from monai_petl.weights.inflation import __all__ as __all__
