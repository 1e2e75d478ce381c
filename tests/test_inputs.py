"""Inputs from the field are read as they should be, or refused with a sentence; docs/data.md says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.input_table import rows_in, table_row
from tests.inputs import Input, all_inputs, try_input


@pytest.mark.parametrize("tried", all_inputs(), ids=lambda tried: f"{tried.kind}: {tried.what}")
def test_an_input_is_read_as_it_should_be_or_refused_with_a_sentence(tried: Input, tmp_path: Path) -> None:
    outcome = try_input(tried, tmp_path)
    assert outcome.result == ("refused" if tried.refused else "read"), outcome.sentence
    for text in tried.says:
        assert text in outcome.sentence
    assert table_row(tried, outcome) in rows_in(tried.kind), "run python -m docs.input_table"


def test_the_table_lists_no_other_inputs() -> None:
    inputs = all_inputs()
    names = {(tried.kind, tried.what) for tried in inputs}
    assert len(names) == len(inputs)
    for kind in {tried.kind for tried in inputs}:
        assert len(rows_in(kind)) == sum(tried.kind == kind for tried in inputs)
