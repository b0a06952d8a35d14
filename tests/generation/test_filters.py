"""The measure of repetition, by hand, and the order of the faults."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dts_hf.generation.answers import said_of, summary
from dts_hf.generation.filters import LEAST_TOKENS, MAX_REPETITION, fault, repetition


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),  # no 4-gram
        ([1, 2, 3, 4], 0.0),
        ([7] * 6, 1 - 1 / 3),  # three 4-grams, one distinct
        ([1, 2, 3, 4, 5] * 2, 1 - 5 / 7),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 - 5 / 6),  # one of six was there,
        (list(range(10)) * 2, 1 - 10 / 17),
        (list(range(10)) * 3, 1 - 10 / 27),
        (list(range(50)), 0.0),
    ],
)
def test_repetition_is_one_minus_distinct_over_all(tokens: Sequence[int], expected: float) -> None:
    assert repetition(tokens) == pytest.approx(expected, abs=1e-15)


def test_the_threshold_lies_between_twice_and_three_times() -> None:
    twice, thrice = list(range(40)) * 2, list(range(40)) * 3
    assert repetition(twice) < MAX_REPETITION < repetition(thrice)
    assert fault("x", twice, True, "drop", MAX_REPETITION) is None
    assert fault("x", thrice, True, "drop", MAX_REPETITION) == "repeating"
    assert fault("x", thrice, True, "drop", 1.0) is None


def test_short_answers_are_not_judged_and_the_first_fault_counts() -> None:
    assert fault("no no", [5] * (LEAST_TOKENS - 1), True, "drop", 0.0) is None
    assert fault("no no", [5] * LEAST_TOKENS, True, "drop", 0.5) == "repeating"
    assert fault("no no", [5] * LEAST_TOKENS, False, "drop", 0.5) == "cut"
    assert fault("no no", [5] * LEAST_TOKENS, False, "keep", 0.5) == "repeating"
    assert fault("", [5] * LEAST_TOKENS, False, "drop", 0.5) == "empty"


def test_counts_of_blocks_add_up_and_name_the_first_rows() -> None:
    blocks = [
        {"counts": {"rows": 4, "generated": 4, "kept": 1, "empty": 3, "rows_answered": 1}, "without": ["a", "b", "c"]},
        {"counts": {"rows": 4, "generated": 3, "kept": 0, "cut": 3, "no_prompt": 1}, "without": ["d", "e", "f", "g"]},
    ]
    counts = summary(blocks)
    assert counts["without_answer"] == ["a", "b", "c", "d", "e"] and counts["rows"] == 8 and counts["not_best"] == 0
    assert said_of(counts) == (
        "1 of 7 answers to 8 rows kept; left out as empty: 3; left out as cut at the limit: 3; prompts that do not fit: 1; "
        "rows without an answer: 7 (a, b, c, d, e, ...)"
    )
