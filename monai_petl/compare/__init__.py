"""Methods side by side on one bundle, and the report that tells which to take. Needs the extra ``report``."""

from monai_petl.compare.markdown import markdown_table
from monai_petl.compare.plan import Job, Plan
from monai_petl.compare.report import write_report
from monai_petl.compare.results import Results
from monai_petl.compare.run import compare, run_plan
from monai_petl.compare.schedule import Schedule, find_devices
from monai_petl.compare.statistics import Difference, efficiency, paired_difference, pareto_front

__all__ = [
    "Difference",
    "Job",
    "Plan",
    "Results",
    "Schedule",
    "compare",
    "efficiency",
    "find_devices",
    "markdown_table",
    "paired_difference",
    "pareto_front",
    "run_plan",
    "write_report",
]
