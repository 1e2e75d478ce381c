"""Patterns of others' files either match quickly or are refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monai_petl.methods.parts.quick_patterns import require_quick

NAME = "encoder.layers.10.attention.query_key_value.projection" + ".a" * 30


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"^blocks\.1\.attn\.qkv",
        r".*\.layers\.(1|2)\.[qv]_proj",
        r"model\.layers\.\d+\.attn\.(q|v)",
        "(x)?",
        r"\(a\)\+",
        "[(*+]x",
    ],
)
def test_patterns_that_name_layers_are_taken(pattern):
    require_quick(pattern)


@pytest.mark.parametrize(
    "pattern", ["(a+)+x", "(a*)*", "(a|aa)+$", "(?:.*a){20}", "(x+x+)+y", ".*.*.*.*x", "a?" * 30, "x" * 2000]
)
def test_patterns_that_may_not_end_are_refused(pattern):
    with pytest.raises(ValueError, match="could take for ever to match"):
        require_quick(pattern)


@given(st.lists(st.sampled_from([*"ax.*+?|()[]{}", "\\", "{2,}", "(a", "(?:", ".*", "a+"]), max_size=40).map("".join))
def test_what_is_taken_matches_within_a_second(pattern):
    try:
        require_quick(pattern)
        compiled = re.compile(rf"(.*\.)?(?:{pattern})")
    except (ValueError, re.error, OverflowError):
        return
    start = time.process_time()
    compiled.fullmatch(NAME)
    compiled.fullmatch("a" * 100 + "!")
    assert time.process_time() - start < 1
