"""The command line: a page of help for each verb, made from the function that does the work."""

from monai_petl.cli.command import Command
from monai_petl.cli.dispatch import run

__all__ = ["Command", "run"]
