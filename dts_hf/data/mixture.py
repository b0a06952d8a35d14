"""A mixture of sources: each row of a source counts ``weight`` times in an epoch, exactly, and the same ones every time."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dts_hf.data.mapped_rows import ids_of
from dts_hf.data.rows import Row
from dts_hf.errors import UserError


@dataclass(frozen=True)
class Part:
    """What one source gives to a mixture.

    Attributes:
        source: its name, without folders of this machine.
        split: its own split, or None.
        weight: how often each of its rows counts in an epoch.
        rows: rows that were read of it.
        used: how many it gives.
    """

    source: str
    split: str | None
    weight: float
    rows: int
    used: int

    def described(self) -> dict[str, Any]:
        """As in ``data_manifest.json``."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def __str__(self) -> str:
        name = self.source if self.split is None else f"{self.source} ({self.split})"
        return f"{self.used:,} of {name}" + ("" if self.weight == 1 else f" ({self.rows:,} rows x {self.weight:g})")


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources, and what each source gave."""

    rows: Sequence[Row]
    parts: tuple[Part, ...]


def parts_of(rows: Sequence[Row], mixture: Mixture) -> tuple[Part, ...]:
    """What each source of ``mixture`` gave to ``rows``, which are some of its rows."""
    kept, ids, start, parts = set(ids_of(rows)), ids_of(mixture.rows), 0, []
    for part in mixture.parts:
        of_part = ids[start : start + part.used]
        parts.append(dataclasses.replace(part, used=sum(row_id in kept for row_id in of_part)))
        start += part.used
    return tuple(parts)


def is_mixed(parts: Sequence[Part]) -> bool:
    """Whether there is more to say than the name of one source that counts once."""
    return len(parts) > 1 or any(part.weight != 1 for part in parts)


def summary(parts: Sequence[Part]) -> str:
    """What was mixed, in one line for people."""
    return f"mixed {sum(part.used for part in parts):,} rows: {'; '.join(map(str, parts))}"


def weighted(rows: Sequence[Row], weight: float, source: str) -> list[Row]:
    """``rows``, each ``weight`` times: all of them once, twice, ..., and of the rest so many that the count is right.

    Which rows the rest takes depends on their ids alone: the same on every process, in every attempt of a run and for
    every ``training.seed``. Drawing with replacement would reach the weights on average only, leave a third of the rows of
    a source out, and make an epoch something else for each seed.

    Args:
        rows: of one source.
        weight: above 0.
        source: their name, for errors.

    Returns:
        ``weight * len(rows)`` rows (a half counts as one), in their order, repeated ones with the ids ``id#2``, ``id#3``.

    Raises:
        UserError: no row is left.
    """
    if weight == 1:
        return list(rows)
    # Fraction(str()): 0.29 * 50 rows are 14.5, and 14.499999999999998 in floating point.
    count = math.floor(Fraction(str(weight)) * len(rows) + Fraction(1, 2))
    if not count:
        raise UserError(
            f"{source}: a weight of {weight:g} leaves none of its {len(rows)} rows; raise it or leave it out"
        )
    whole, rest = divmod(count, len(rows))
    drawn = {row.id for row in sorted(rows, key=_rank)[:rest]}
    passes = [*([rows] * whole), [row for row in rows if row.id in drawn]]
    return [
        row if number == 1 else dataclasses.replace(row, id=f"{row.id}#{number}")
        for number, of_pass in enumerate(passes, 1)
        for row in of_pass
    ]


def _rank(row: Row) -> bytes:
    """A place in an order that is as good as random and does not depend on the version of Python."""
    return hashlib.sha256(row.id.encode()).digest()
