"""Row files that are tables: Parquet, and Arrow as ``datasets`` saves it. What the rows mean is checked elsewhere."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dts_hf.data import file_limits as limits
from dts_hf.errors import UserError, not_readable

PARQUET_BATCH = 100  # rows that are unpacked before anyone looks at their size
_ARROW_FILE = b"ARROW1\0\0"  # how Arrow's file format begins; what follows is a stream with a footer


@contextmanager
def _reading(file: Path, name: str) -> Iterator[None]:
    """What goes wrong in a table is a ``UserError``."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OverflowError, struct.error, IndexError) as error:
        raise UserError(f"{file}: not a readable {name} file: {error}") from error
    except OSError as error:
        raise not_readable(error, f"{file}: cannot be read: {error.strerror or error}") from error


def count_parquet_rows(file: Path) -> int:
    """Rows of a Parquet file from its footer.

    Raises:
        UserError: it cannot be read.
    """
    import pyarrow.parquet as pq

    with _reading(file, "Parquet"):
        return int(pq.read_metadata(file).num_rows)


def parquet_objects(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (number, place, object) of every row.

    Raises:
        UserError: no Parquet file, or one that unpacks to too much.
    """
    import pyarrow.parquet as pq

    number = size = 0
    with _reading(file, "Parquet"):
        most = limits.most_bytes(file)
        with pq.ParquetFile(file) as table:
            groups = range(table.metadata.num_row_groups)
            if sum(table.metadata.row_group(group).total_byte_size for group in groups) > most:
                raise limits.expands(file)
            for batch in table.iter_batches(batch_size=PARQUET_BATCH):
                # A dictionary of few long texts is small, in the footer as well as here, until it is written out.
                size += sum(_written_out(column).nbytes for column in batch.columns)
                if size > most:
                    raise limits.expands(file)
                for obj in _rows_of(batch, file, number):
                    number += 1
                    yield number, f"{file}: row {number}", obj


def arrow_objects(file: Path) -> Iterator[tuple[int, str, Any]]:
    """Yield (number, place, object) of every row of an Arrow stream or file, read from the disk as it goes.

    Raises:
        UserError: no Arrow file, a compressed one, or one that writes out to too much.
    """
    import pyarrow as pa

    number = size = 0
    with _reading(file, "Arrow"):
        most = limits.most_bytes(file)
        with pa.memory_map(str(file)) as source:
            start = len(_ARROW_FILE) if source.read(len(_ARROW_FILE)) == _ARROW_FILE else 0
            _refuse_compressed(source, start, file)
            source.seek(start)
            for whole in pa.ipc.open_stream(source):
                for first in range(0, whole.num_rows, PARQUET_BATCH):
                    batch = whole.slice(first, PARQUET_BATCH)
                    batch.validate(full=True)  # offsets that lead outside are read as they are otherwise
                    size += sum(_written_out(column).nbytes for column in batch.columns)
                    if size > most:
                        raise limits.expands(file)
                    for obj in _rows_of(batch, file, number):
                        number += 1
                        yield number, f"{file}: row {number}", obj


def _rows_of(batch: Any, file: Path, before: int) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: a text after row {before} is not UTF-8: {error.reason}") from error


def _written_out(column: Any) -> Any:
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def _refuse_compressed(source: Any, start: int, file: Path) -> None:
    """Compressed batches are unpacked whole before anybody can ask for their size; ``datasets`` writes none."""
    import pyarrow as pa

    source.seek(start)
    try:
        for message in pa.ipc.MessageReader.open_stream(source):
            if _is_compressed(message.metadata.to_pybytes()):
                raise UserError(
                    f"{file}: a compressed Arrow file, expected a plain one as datasets saves it; convert it to Parquet: "
                    "pyarrow.parquet.write_table(pyarrow.feather.read_table(FILE), 'rows.parquet')"
                )
    except StopIteration:
        return


def _is_compressed(metadata: bytes) -> bool:
    """Whether a message of Arrow's stream is a compressed batch: its flatbuffer has no reader in pyarrow.

    ``Message {version, header_type, header, ...}``, ``RecordBatch {length, nodes, buffers, compression}``,
    ``DictionaryBatch {id, data: RecordBatch, ...}`` (Message.fbs of Apache Arrow).
    """

    def field(table: int, index: int) -> int:
        """Where a table's field stands; 0: it has none."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, vtable)[0]
        place = 4 + 2 * index
        offset = struct.unpack_from("<H", metadata, vtable + place)[0] if place < size else 0
        return table + offset if offset else 0

    def table_at(place: int) -> int:
        return int(place + struct.unpack_from("<I", metadata, place)[0])

    message = table_at(0)
    kind, header = field(message, 1), field(message, 2)
    if not kind or not header or metadata[kind] not in (2, 3):
        return False
    batch = table_at(header)
    if metadata[kind] == 2:
        inner = field(batch, 1)
        if not inner:
            return False
        batch = table_at(inner)
    return bool(field(batch, 3))
