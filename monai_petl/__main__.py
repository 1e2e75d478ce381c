"""Command line: ``python -m monai_petl VERB``."""

from __future__ import annotations

import sys

from monai_petl.cli import run
from monai_petl.cli.verbs import VERBS

__all__ = ["main"]


def main() -> None:
    """Run a verb; an error that a user can mend is one sentence and exit code 1, a wrong option one and exit code 2."""
    run(VERBS, "python -m monai_petl", sys.argv[1:])


if __name__ == "__main__":
    main()
