"""Writes the table of what works in docs/bundles.md from what the checks and the server's test found: see ``make support``.

python docs/support_table.py build/verify.json build/label.xml
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PAGE = Path(__file__).parent / "bundles.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
COLUMNS = (
    "train",
    "evaluate",
    "infer",
    "2 processes",
    "TorchScript",
    "torch.export",
    "ONNX",
    "Zoo checks",
    "MONAI Label",
)
EXPORTS = ("TorchScript scripted", "TorchScript traced", "torch.export", "ONNX")


def row_of(verification: Mapping[str, Any], label: frozenset[str] = frozenset()) -> dict[str, str]:
    """The cells of a bundle, from what ``bundle verify`` found and the names of the bundles that the server's test passed."""
    status = {found["check"]: found["status"] for found in verification["checks"]}
    own = ("train", "evaluate", "infer", "2 processes")
    cells = {name: status[name] == "passed" for name in (*own, "torch.export", "ONNX")}
    cells["Zoo checks"] = all(found == "passed" for name, found in status.items() if name not in (*own, *EXPORTS))
    cells["MONAI Label"] = verification["bundle"] in label
    words = {name: "yes" if works else "no" for name, works in cells.items()}
    kinds = [kind.split(" ")[1] for kind in EXPORTS[:2] if status[kind] == "passed"]
    return {name: words.get(name, " and ".join(kinds) or "no") for name in COLUMNS}


def rows_in(page: Path) -> dict[str, dict[str, str]]:
    """The cells of each bundle, as the page has them."""
    table = page.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if "](" in line]
    return {re.sub(r"^\[`|`\].*$", "", line[0]): dict(zip(COLUMNS, line[1:], strict=True)) for line in lines}


def main(verified: str, label: str) -> None:
    """Write the table into the page."""
    cases = ElementTree.parse(label).iter("testcase")
    passed = [case.get("name", "") for case in cases if not list(case)]
    served = frozenset(name.split("[")[1].rstrip("]") for name in passed if "[" in name)
    lines = [f"| bundle | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for found in json.loads(Path(verified).read_text(encoding="utf-8")):
        name = found["bundle"]
        lines.append(f"| [`{name}`](../bundles/{name}/docs/README.md) | {' | '.join(row_of(found, served).values())} |")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
