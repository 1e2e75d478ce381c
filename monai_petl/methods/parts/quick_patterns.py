"""Regular expressions from files of others: those that could take for ever to match are refused.

Python's ``re`` tries every way to match. The time for repetitions within repetitions, ``(a+)+``, doubles with every letter.
"""

from __future__ import annotations

import re

__all__ = ["require_quick"]

REPETITIONS, OPTIONS, LONGEST = 3, 8, 1000


def require_quick(pattern: str) -> None:
    """Accept the patterns that name layers, such as ``.*\\.layers\\.\\d+\\.(q|v)``, and refuse what may not end.

    Raises:
        ValueError: a group is repeated, or there are more than 3 repetitions, 8 optional parts or 1000 letters.
    """
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    repeated = re.search(r"\)[*+{]", plain)
    many = len(re.findall(r"[*+{]", plain)) > REPETITIONS or plain.count("?") > OPTIONS or len(pattern) > LONGEST
    if repeated or many:
        short = pattern if len(pattern) <= 60 else f"{pattern[:60]}..."
        raise ValueError(
            f"the pattern {short!r} could take for ever to match: it repeats a group, or has too many repetitions "
            f"(at most {REPETITIONS}). Write the names of the layers"
        )
