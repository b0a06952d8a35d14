"""A part of many cases every day, and all of them in ``make soak``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def one_in(count: int, values: Iterable[Any]) -> list[Any]:
    """Parameters: every ``count``-th of ``values``, the first among them, and the others marked ``soak``."""
    return [
        value if place % count == 0 else pytest.param(value, marks=pytest.mark.soak)
        for place, value in enumerate(values)
    ]


#: Of cases that a test goes through by itself. Odd, so that a fifth of alternating cases has both kinds.
shares = pytest.mark.parametrize("share", [5, pytest.param(1, marks=pytest.mark.soak)], ids=["a fifth", "all"])


def share_of(cases: Sequence[Any], share: int, place: int) -> Sequence[Any]:
    """Every ``share``-th of ``cases``, beginning at another for each ``place``; a share of 1 is all of them."""
    return cases[place % share :: share]
