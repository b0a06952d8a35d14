"""The text of a first recipe."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from dts_hf.starter.writing import Choice, Choices, recipe_text


@pytest.mark.parametrize(("rows", "epochs", "max_steps", "expected"), [
    (128, 3, None, 1), (4000, 3, None, 10), (1000, 3, None, 5), (4000, 1, 20, 1),
])  # fmt: skip
def test_a_short_run_logs_often_enough_for_a_curve(
    rows: int, epochs: int, max_steps: int | None, expected: int
) -> None:
    other: Any = dict.fromkeys(Choices.__dataclass_fields__, Choice(1, "because"))
    given = {"validation": Choice(0.1, ""), "length": Choice(epochs, ""), "max_steps": max_steps, "student": None,
             "batch_size": Choice(8, ""), "accumulation": Choice(2, "")}  # fmt: skip
    teacher, data = (
        Mock(parameters=1e6, layers=2, vocabulary=9),
        Mock(rows=rows, kinds={}, totals=[1], source="a.jsonl"),
    )
    teacher.name = "teacher"
    text = recipe_text(Choices(**{**other, **given}), teacher, data, "runs/a")
    assert yaml.safe_load(text)["training"]["logging_steps"] == expected
