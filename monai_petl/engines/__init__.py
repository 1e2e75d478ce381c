"""Trainers that MONAI has not got."""

from __future__ import annotations

from monai_petl.engines.student_teacher import PrepareViews, StudentTeacherTrainer, make_teacher

__all__ = ["PrepareViews", "StudentTeacherTrainer", "make_teacher"]
