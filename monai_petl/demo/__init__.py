"""The main job from end to end on a small data set, with a report to look at."""

from monai_petl.demo.run import demo

__all__ = ["demo"]
