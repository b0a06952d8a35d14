"""Which of several teachers a row has: a column of the data names it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dts_hf.errors import UserError, nearest

#: Of a tokenised row and in a batch: the place of its teacher in ``Routing.names``.
TEACHER = "teacher_number"
#: A source of rows by name, and how many rows it gave; the sources are in the order of the rows.
SourceRows = tuple[str, int]


class NamesTeacher(Protocol):
    """A row of text (``rows.Row``), as far as it is looked at here."""

    @property
    def id(self) -> str: ...

    @property
    def teacher(self) -> Any: ...


class HasTeachers(Protocol):
    """Rows as tokens (``encoding.EncodedDataset``), as far as they are looked at here."""

    row_ids: list[str]
    teachers: list[int] | None


@dataclass(frozen=True)
class Routing:
    """How rows name their teacher.

    Attributes:
        column: of the rows.
        names: of the teachers.
        default: the teacher of rows that name none; None: such a row is an error.
    """

    column: str
    names: tuple[str, ...]
    default: str | None = None

    def columns(self, columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
        """``data.columns`` with the column of the teacher, for rows of text."""
        return {**(columns or {}), "teacher": self.column}

    def number(self, value: Any, place: str) -> int:
        """The place in ``names`` of the teacher that ``value`` names.

        Args:
            value: of the column; None or an empty text: the row names none.
            place: what errors call the row.

        Raises:
            UserError: it is no teacher, or there is none and no default.
        """
        known = ", ".join(self.names)
        if value is None or value == "":
            if self.default is not None:
                return self.names.index(self.default)
            raise UserError(
                f"{place}: no teacher in its column '{self.column}' (data.teacher_column), expected one of {known}. "
                "data.default_teacher says which one rows without a name have"
            )
        if value not in self.names:  # a default is for rows that say nothing, not for those that are misspelt
            raise UserError(
                f"{place}: got {value!r} in the column '{self.column}' (data.teacher_column), which is no teacher; "
                f"expected one of {known}.{nearest(str(value), self.names)}"
            )
        return self.names.index(value)

    def numbers(self, rows: Iterable[NamesTeacher], name: str, sources: Sequence[SourceRows] = ()) -> dict[str, int]:
        """The number of each row's teacher, by the row's id.

        Args:
            rows: all of them, in order.
            name: what errors call them, such as ``data.train``.
            sources: where they are from.

        Raises:
            UserError: names the first row that has no teacher, and its source.
        """
        found, ends = {}, _ends(sources)
        for place, row in enumerate(rows):
            source = next((f"{source}: " for source, end in ends if place < end), "")
            found[row.id] = self.number(row.teacher, f"{name}: {source}row '{row.id}'")
        return found

    def route(
        self, dataset: HasTeachers, rows: Iterable[NamesTeacher], name: str, sources: Sequence[SourceRows] = ()
    ) -> None:
        """Give each row of ``dataset`` its teacher.

        Args:
            dataset: what was made of ``rows``.
            rows: their text.
            name: what errors call them.
            sources: where they are from.

        Raises:
            UserError: see ``numbers``.
        """
        by_id = self.numbers(rows, name, sources)
        dataset.teachers = [by_id[row_id] for row_id in dataset.row_ids]

    def counts(self, dataset: HasTeachers) -> dict[str, int]:
        """How many rows each teacher has."""
        teachers = dataset.teachers or []
        return {name: teachers.count(number) for number, name in enumerate(self.names)}


class OwnRows:
    """The rows of a data set that have one of some teachers, read by number as those of the data set are.

    Args:
        dataset: routed.
        numbers: of the teachers.
    """

    def __init__(self, dataset: Any, numbers: Collection[int]) -> None:
        self._dataset = dataset
        self._places = [place for place, number in enumerate(dataset.teachers) if number in numbers]
        self.lengths = [dataset.lengths[place] for place in self._places]
        ids = getattr(dataset, "row_ids", None)
        self.row_ids = None if ids is None else [ids[place] for place in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self._places[index]]


def names_problem(teachers: Iterable[str]) -> str:
    """What is wrong with the names of several teachers, which are in the log and in file names; empty where nothing is."""
    names = list(teachers)
    if not names:
        return "teachers: got none, expected at least one, by name"
    wrong = [
        name for name in names if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)
    ]
    if wrong:
        return f"teachers: got the name {wrong[0]!r}, expected letters, digits, '-' and '_', a letter or a digit first"
    return ""


def weights_problem(
    teachers: Iterable[str],
    column: str | None,
    weights: Mapping[str, float] | None,
    key: str = "teacher_weights",
    column_key: str = "teacher_column",
) -> str:
    """What is wrong with the weights of several teachers; empty where nothing is.

    Args:
        teachers: their names.
        column: of the rows; with one, each row has one teacher and weights mean nothing.
        weights: by name; None: none was given.
        key: what messages call them.
        column_key: and the column.
    """
    names = list(teachers)
    if column is not None:
        beside = f"{key}: got weights beside a column that gives each row one teacher; expected one of the two"
        return beside if weights else ""
    if weights is None or {*weights} != {*names}:
        missing = [name for name in names if name not in (weights or {})] or [*{*(weights or {})} - {*names}]
        return (
            f"{key}: expected a weight for each of {', '.join(names)}, or a column of the rows ({column_key}) that gives "
            f"each row one teacher; wrong: {', '.join(missing)}"
        )
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1:
            return f"{key}: got {weight!r} for {name}, expected a number above 0, up to 1"
    if not math.isclose(total := math.fsum(weights.values()), 1.0, abs_tol=1e-6):
        return f"{key}: they add up to {total:g}, expected 1"
    return ""


def _ends(sources: Sequence[SourceRows]) -> list[SourceRows]:
    """Behind which row each source ends."""
    found, end = [], 0
    for source, count in sources:
        end += count
        found.append((source, end))
    return found
