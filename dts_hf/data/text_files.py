"""Row files that are text, plain or gzip: JSON lines, one JSON value, CSV, TSV. What objects mean is checked elsewhere."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dts_hf.data import file_limits as limits
from dts_hf.errors import UserError, not_readable

#: The key of a JSON object that holds its rows.
DOCUMENT_KEY = "data"


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """``file`` for reading, unpacked; what goes wrong on the disk or in the archive is a ``UserError``."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            yield stream  # type: ignore[misc]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: the gzip file is broken: {error}") from error
    except OSError as error:
        raise not_readable(error, f"{file}: cannot be read: {error.strerror or error}") from error


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, bytes) of each line; only a line feed ends a line, never U+2028 inside a string.

    Raises:
        UserError: the file cannot be read, is broken gzip, has a line above 64 MiB, or unpacks to too much.
    """
    number = size = 0
    with _opened(file) as stream:
        most = limits.most_bytes(file)
        while raw := _next_line(stream, file, number):
            number, size = number + 1, size + len(raw)
            if len(raw) > limits.LONGEST_LINE:
                raise UserError(
                    f"{file}: line {number} has more than {limits.LONGEST_LINE >> 20} MiB, expected one row a line"
                )
            if size > most:
                raise limits.expands(file)
            yield number, raw


def _next_line(stream: IO[bytes], file: Path, number: int) -> bytes:
    try:
        return stream.readline(limits.LONGEST_LINE + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: the gzip file is broken after line {number}: {error}") from error


def _decoded(raw: bytes, number: int, where: str) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error


# ------------------------------------------------------------------------------------------------------------- JSON


class _KeyTwice(ValueError):
    """An object of JSON has a key twice; which of the two was meant, nobody can tell."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise _KeyTwice(f"the key '{twice[:80]}' is there twice, expected each key once in an object")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_object)  # once: json.loads would make one for each line


def json_lines(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (line, place, object) of each line that is not blank.

    Raises:
        UserError: as ``read_lines``, or a line that is no JSON, or has a key twice.
    """
    for number, raw in read_lines(file):
        where = f"{file}: line {number}"
        line = _decoded(raw, number, where)
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise UserError(
                f"{file}: this is one JSON list, expected JSON lines: one object a line, without commas. A file whose name "
                "ends in .json may be one list"
            )
        try:
            obj = _JSON.decode(line)
        except _KeyTwice as error:
            raise UserError(f"{where}: {error}") from None
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{where}: broken JSON: {reason}. Expected one object a line.") from error
        yield number, where, obj


def json_objects(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (number, place, object) of a ``.json`` file: a list of rows, ``{"data": [...]}``, or JSON lines after all.

    Raises:
        UserError: as ``read_lines``, or it is none of the three, or an object has a key twice.
    """
    if not _is_one_value(file):
        yield from json_lines(file)
        return
    rows = _document(file)
    for number, obj in enumerate(rows, 1):
        yield number, f"{file}: row {number}", obj


def _is_one_value(file: Path) -> bool:
    """Whether the file is one JSON value: a list, an object over several lines, or one that holds the rows."""
    with _opened(file) as stream:
        if stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return True
    lines = (raw for _, raw in read_lines(file) if raw.strip())
    first, second = next(lines, b""), next(lines, b"")
    try:
        value = json.loads(first.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        # A broken first line of many, or the beginning of an object: read as one value, either is told by its line.
        return first.lstrip().startswith(b"{") and bool(second)
    rows = value.get(DOCUMENT_KEY) if isinstance(value, Mapping) else None
    return not second and isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows)


def _document(file: Path) -> list[Any]:
    with _opened(file) as stream:
        raw = stream.read(min(limits.LONGEST_DOCUMENT, limits.most_bytes(file)) + 1)
    if len(raw) > limits.LONGEST_DOCUMENT:
        raise UserError(
            f"{file}: one JSON value of more than {limits.LONGEST_DOCUMENT >> 20} MiB, which is read whole; save it as JSON "
            "lines (.jsonl), one object a line"
        )
    if len(raw) > limits.most_bytes(file):
        raise limits.expands(file)
    text = _decoded(raw, 1, str(file))
    try:
        value = _JSON.decode(text)
    except _KeyTwice as error:
        raise UserError(f"{file}: {_place_of_twice(text)}{error}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise UserError(f"{file}: broken JSON: {reason}. Expected a list of objects, or one object a line") from None
    rows = value.get(DOCUMENT_KEY) if isinstance(value, Mapping) else value
    if isinstance(rows, list):
        return rows
    keys = ", ".join(f"'{str(key)[:80]}'" for key in list(value)[:20]) if isinstance(value, Mapping) else "no object"
    raise UserError(
        f'{file}: expected a list of rows, or {{"{DOCUMENT_KEY}": [...]}} with the rows in it; found one object with the '
        f"keys {keys or 'none'}"
    )


def _place_of_twice(text: str) -> str:
    """``row 3: ``, of the first row in which an object has a key twice; nothing where that is around the rows."""

    def marked(pairs: list[tuple[str, Any]]) -> Any:
        try:
            return _object(pairs)
        except _KeyTwice as error:
            return error

    def has_one(value: Any) -> bool:
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return isinstance(value, _KeyTwice) or any(map(has_one, inner))

    try:
        value = json.loads(text, object_pairs_hook=marked)
    except (ValueError, RecursionError):  # what comes behind it is broken, too
        return ""
    rows = value.get(DOCUMENT_KEY) if isinstance(value, dict) else value
    number = next((place for place, row in enumerate(rows, 1) if has_one(row)), 0) if isinstance(rows, list) else 0
    return f"row {number}: " if number else ""


# -------------------------------------------------------------------------------------------------------- CSV and TSV


def csv_objects(file: Path) -> Iterator[tuple[int, str, dict[str, str | None]]]:
    """Yield (row, place, object) of each row below the header. Cells are text, numbers too; an empty one is missing.

    Commas (in ``.tsv`` files tabs) separate; a cell in double quotes may hold them, and line feeds.

    Raises:
        UserError: as ``read_lines``, no header, a row of another width, or quotes that do not close.
    """
    delimiter = "\t" if ".tsv" in file.suffixes[-2:] else ","
    # The limit of the process is 128 KiB a cell, less than many answers; the lines have a limit of their own.
    csv.field_size_limit(max(csv.field_size_limit(), limits.LONGEST_LINE))
    lines = (_decoded(raw, number, f"{file}: line {number}") for number, raw in read_lines(file))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number, header = 0, None
    while True:
        began = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{file}: line {began}: broken {delimiter_name(delimiter)}: {error}. A cell that begins with a double quote "
                'ends with one, and quotes in it are doubled ("")'
            ) from None
        if cells is None:
            return
        if header is None:
            header = _header(cells, file, delimiter) if cells else None
        elif cells:
            number += 1
            where = f"{file}: line {began}"
            if len(cells) != len(header):
                raise UserError(f"{where}: found {len(cells)} cells, expected {len(header)} as in the first line")
            yield number, where, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def delimiter_name(delimiter: str) -> str:
    """What a file with this separator is called."""
    return "TSV" if delimiter == "\t" else "CSV"


def _header(cells: list[str], file: Path, delimiter: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and any(mark in names[0] for mark in ",;\t|"):
        separated = "tabs" if delimiter == "\t" else "commas"
        raise UserError(f"{file}: line 1: got one column {names[0][:80]!r}, expected names separated by {separated}")
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{file}: line 1: two columns are called '{min(twice)}', expected names that differ")
    return names
