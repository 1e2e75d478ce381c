"""Writes the table of inputs in docs/data.md from what the tests' inputs give: ``python -m docs.input_table``."""

from __future__ import annotations

import re
import tempfile
from itertools import groupby
from pathlib import Path

from tests.inputs import Input, Outcome, all_inputs, try_input

PAGE = Path(__file__).parent / "data.md"
BEGIN, END = "<!-- inputs: begin -->", "<!-- inputs: end -->"


def table_row(tried: Input, outcome: Outcome) -> str:
    """A row of the table."""
    sentence = re.sub(r"\s+", " ", outcome.sentence).replace("|", "\\|")
    return f"| {tried.what} | {outcome.result} | {sentence} |"


def rows_in(kind: str) -> list[str]:
    """The rows of a kind as the page has them."""
    table = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    part = re.search(rf"^### {re.escape(kind)}\n(.*?)(?=^### |\Z)", table, re.MULTILINE | re.DOTALL)
    rows = [line for line in part[1].splitlines() if line.startswith("|")] if part else []
    return rows[2:]


def main() -> None:
    """Try all inputs and write the table into the page."""
    lines: list[str] = []
    inputs = sorted(all_inputs(), key=lambda tried: tried.kind)
    for kind, group in groupby(inputs, key=lambda tried: tried.kind):
        lines += ["", f"### {kind}", "", "| input | result | sentence |", "| --- | --- | --- |"]
        for tried in group:
            with tempfile.TemporaryDirectory() as folder:
                lines.append(table_row(tried, try_input(tried, Path(folder))))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text("\n".join([f"{before}{BEGIN}", *lines, "", f"{END}{after}"]), encoding="utf-8")


if __name__ == "__main__":
    main()
