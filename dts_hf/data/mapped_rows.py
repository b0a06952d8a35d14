"""Rows that stay in a file: each is made when it is asked for, and processes that share the file share its pages."""

from __future__ import annotations

import dataclasses
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from dts_hf.data.cache import read_table, write_table
from dts_hf.data.rows import Row

if TYPE_CHECKING:
    import pyarrow as pa

_NAMES = tuple(field.name for field in dataclasses.fields(Row))
#: A block is written when it has so many rows, or so many bytes: a row may be of 60 MB.
BLOCK_ROWS, BLOCK_BYTES = 1000, 1 << 24


class NotKept(OSError):
    """A row that would not come out of the file as it went in, such as one with a date in it."""


def row_line(row: Row) -> bytes:
    """``row`` as JSON. Keys stand in their order: a template may write them so."""
    # Escaped, a row of 60 MB that is not ASCII would be one of 180 MB
    text = json.dumps([getattr(row, name) for name in _NAMES], default=repr, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows``, of which only a block is in memory at a time.

    Raises:
        NotKept: see there.
        OSError: of the disk.
    """
    import pyarrow as pa

    schema = pa.schema([("row_id", pa.string()), ("row", pa.large_binary())])

    def blocks() -> Iterator[list[pa.Array]]:
        ids: list[str] = []
        lines: list[bytes] = []
        size = 0
        for row in rows:
            line = row_line(row)
            if _row(line) != row:
                raise NotKept(f"row '{row.id}' holds more than text, numbers, lists and objects")
            ids.append(row.id)
            lines.append(line)
            size += len(line)
            if len(ids) == BLOCK_ROWS or size >= BLOCK_BYTES:
                yield [pa.array(ids, pa.string()), pa.array(lines, pa.large_binary())]
                ids, lines, size = [], [], 0
        yield [pa.array(ids, pa.string()), pa.array(lines, pa.large_binary())]

    write_table(path, schema, blocks())


def _row(line: bytes) -> Row:
    values = dict(zip(_NAMES, json.loads(line), strict=True))
    for name in ("references", "messages", "tools"):
        if values[name] is not None:
            values[name] = tuple(values[name])
    return Row(**values)


class MappedRows(Sequence[Row]):
    """The rows of a file, or some of them, in an order.

    Args:
        path: of ``write_rows``.
        sha256: of the file.
        places: numbers of rows in the file; None: all.
    """

    def __init__(self, path: Path, sha256: str, places: Sequence[int] | None = None) -> None:
        self.path, self.sha256, self._table = path, sha256, read_table(path)
        chunks = self._table.column("row").chunks
        self._chunks, self._firsts = chunks, [0, *accumulate(map(len, chunks))]
        self.places = range(self._firsts[-1]) if places is None else places

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedRows, (self.path, self.sha256, self.places)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> MappedRows: ...
    def __getitem__(self, index: int | slice) -> Row | MappedRows:
        if isinstance(index, slice):
            return self._with(self.places[index])
        place = self.places[index]
        part = bisect_right(self._firsts, place) - 1
        return _row(self._chunks[part][place - self._firsts[part]].as_py())

    def ids(self) -> list[str]:
        """The ids alone, for which no row is made."""
        ids = self._table.column("row_id").to_pylist()
        return ids if self.places == range(len(ids)) else [ids[place] for place in self.places]

    def picked(self, places: Sequence[int]) -> MappedRows:
        """The rows with these numbers."""
        return self._with(array("q", [self.places[place] for place in places]))

    def _with(self, places: Sequence[int]) -> MappedRows:
        """Of the file as it is mapped already: its name may be gone."""
        other = MappedRows.__new__(MappedRows)  # copy.copy would pickle it, and look for the name
        other.__dict__.update(self.__dict__, places=places)
        return other


def ids_of(rows: Sequence[Row]) -> list[str]:
    """The id of each row."""
    return rows.ids() if isinstance(rows, MappedRows) else [row.id for row in rows]


def picked(rows: Sequence[Row], places: Sequence[int]) -> Sequence[Row]:
    """The rows with these numbers: a list of a list, and of a file what stays in it."""
    return rows.picked(places) if isinstance(rows, MappedRows) else [rows[place] for place in places]
