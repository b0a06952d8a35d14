"""The bytes of row files: lines of JSONL and JSONL.gz, rows of Parquet. What the objects mean is checked elsewhere.

A row file is data of a stranger. It may be cut off, be no text, or be a few bytes that unpack to more than the memory
holds: all of that is a ``UserError`` that names the file and the place.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dts_hf.errors import UserError

LONGEST_LINE = 64 << 20  # bytes; a row is a prompt and its answers
# Text shrinks to a tenth, zeros to a thousandth. Small files may unpack to FREE_BYTES whatever they are.
MOST_EXPANSION, FREE_BYTES = 200, 256 << 20
PARQUET_BATCH = 100  # rows that are unpacked before anyone looks at their size


def row_file_stem(file: Path) -> str:
    """The name of a row file without its ending: ``test`` of ``test.jsonl.gz``."""
    return re.sub(r"\.(jsonl|json|parquet)(\.gz)?$", "", file.name)


def read_objects(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (number, place, object) of every object in a JSONL, JSONL.gz or Parquet file; objects are not checked."""
    return _parquet_objects(file) if file.suffix == ".parquet" else _json_objects(file)


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, bytes) of each line; only a line feed ends a line, never U+2028 inside a string.

    Raises:
        UserError: the file cannot be read, is broken gzip, has a line above 64 MiB, or unpacks to too much.
    """
    number = size = 0
    try:
        most = _most_bytes(file)
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            while raw := stream.readline(LONGEST_LINE + 1):
                number, size = number + 1, size + len(raw)
                if len(raw) > LONGEST_LINE:
                    raise UserError(
                        f"{file}: line {number} has more than {LONGEST_LINE >> 20} MiB, expected one row a line"
                    )
                if size > most:
                    raise _expands(file)
                yield number, raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: the gzip file is broken after line {number}: {error}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


def count_rows(file: Path) -> int:
    """Lines that are not blank; rows of a Parquet file from its footer. The rows themselves are not looked at.

    Raises:
        UserError: as for ``read_lines``, or no Parquet file.
    """
    if file.suffix != ".parquet":
        return sum(1 for _, line in read_lines(file) if line.strip())
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(file).num_rows)
    except pa.ArrowException as error:
        raise UserError(f"{file}: not a readable Parquet file: {error}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error


def _most_bytes(file: Path) -> int:
    return FREE_BYTES + MOST_EXPANSION * os.path.getsize(file)


def _expands(file: Path) -> UserError:
    return UserError(
        f"{file}: unpacks to more than {MOST_EXPANSION} times its size, which no text does; unpack it yourself if it is"
        " what you want"
    )


def _json_objects(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (line, place, object) of each line that is not blank."""
    for number, raw in read_lines(file):
        where = f"{file}: line {number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
        if not text.strip():
            continue
        if number == 1 and text.lstrip().startswith("["):
            raise UserError(f"{file}: this is one JSON list, expected JSON lines: one object a line, without commas")
        try:
            obj = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{where}: broken JSON: {reason}. Expected one object a line.") from error
        yield number, where, obj


def _written_out(column: Any) -> Any:
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def _parquet_objects(file: Path) -> Iterator[tuple[int, str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = size = 0
    try:
        most = _most_bytes(file)
        with pq.ParquetFile(file) as table:
            groups = range(table.metadata.num_row_groups)
            if sum(table.metadata.row_group(group).total_byte_size for group in groups) > most:
                raise _expands(file)
            for batch in table.iter_batches(batch_size=PARQUET_BATCH):
                # A dictionary of few long texts is small, in the footer as well as here, until it is written out.
                size += sum(_written_out(column).nbytes for column in batch.columns)
                if size > most:
                    raise _expands(file)
                for obj in batch.to_pylist():
                    number += 1
                    yield number, f"{file}: row {number}", obj
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: a text after row {number} is not UTF-8: {error.reason}") from error
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {error}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
