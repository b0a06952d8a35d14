"""Encoded rows in files of a cache: written once, then memory-mapped, so that all processes of a machine share them.

A process that finds no file makes it while the others wait for its lock; they, and later runs of the same rows, read it.
Its name is a digest of all that the tokens depend on. A cache only saves work: where it cannot be written or is broken,
rows are encoded as if there were none.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import logging
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from dts_hf.data.cache import FORMAT, code_digest, default_cache, kept, read_table, write_table
from dts_hf.data.chat_templates import Template, is_dated
from dts_hf.data.encoding import EncodedDataset, EncodingReport, KeptRow, encode_rows, encoded_blocks, refuse_empty
from dts_hf.data.mapped_rows import MappedRows, row_line
from dts_hf.data.rows import Row
from dts_hf.files import file_sha256

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Fewer rows are encoded sooner than a file of them is written and checked.
LEAST_ROWS = 1000


def encode_cached(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    cache_dir: str | Path | None = None,
    name: str = "data",
    may_be_empty: bool = False,
    **limits: Any,
) -> tuple[EncodedDataset, EncodingReport]:
    """``encode_rows`` for many rows: the same tokens and report, memory-mapped from a file that is made where it is missing.

    Every process may call it, each on its own: the first one encodes.

    Args:
        rows: the rows; fewer than ``LEAST_ROWS`` are encoded in memory.
        tokenizer: the student's.
        template: from ``resolve_template``.
        cache_dir: of the files; None: ``encoded_rows`` in ``default_cache``.
        name: what errors call these rows.
        may_be_empty: no row has to be left.
        limits: ``max_length``, ``max_prompt_length``, ``long_rows``, ``train_on``.

    Raises:
        UserError: as ``encode_rows``.
    """
    if len(rows) < LEAST_ROWS:
        return encode_rows(rows, tokenizer, template, name=name, may_be_empty=may_be_empty, **limits)
    folder = default_cache() / "encoded_rows" if cache_dir is None else Path(cache_dir).expanduser()
    place = folder / fingerprint(rows, tokenizer, template, limits)
    try:
        encoded = partial(encoded_blocks, rows, tokenizer, template, **limits)
        asked = rows[:1] if isinstance(rows, MappedRows) else rows  # in a file all rows have the columns of the recipe
        for_teacher = any(row.teacher_prefix is not None for row in asked)
        dataset = kept(place, lambda path: _write(path, encoded, for_teacher), _opened)
    except (OSError, NotImplementedError) as error:  # no room, no rights, no locks on this file system
        logger.warning("%s: cannot keep the encoded rows in %s (%s); they stay in memory", name, folder, error)
        return encode_rows(rows, tokenizer, template, name=name, may_be_empty=may_be_empty, **limits)
    assert dataset.report is not None  # it lies beside the rows
    if not may_be_empty:
        refuse_empty(dataset.report, name, limits["max_prompt_length"], limits["max_length"])
    return dataset, dataset.report


def fingerprint(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, template: Template, limits: dict[str, Any]
) -> str:
    """A name for the tokens of ``rows``: all that they depend on, the code that makes them among it.

    Args:
        rows: the rows, in order.
        tokenizer: the student's, as it would be saved.
        template: by its name, where it is one of ours; a chat template is part of the tokenizer.
        limits: as in ``encode_cached``.
    """
    described = {
        "format": FORMAT,
        "code": code_digest(),
        "libraries": [version(library) for library in ("dts_hf", "transformers", "tokenizers", "jinja2")],
        "tokenizer": _tokenizer_digest(tokenizer),
        "template": [template.name, template.is_chat, template.wraps_prompts],
        "limits": limits,
        "day": datetime.date.today().isoformat() if is_dated(tokenizer) else None,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    if isinstance(rows, MappedRows):  # their file is known by its content, so they need not be read
        places = rows.places
        digest.update(
            f"{rows.sha256} {places if isinstance(places, range) else array('q', places).tobytes()!r}".encode()
        )
    else:
        for row in rows:
            digest.update(row_line(row) + b"\n")
    return digest.hexdigest()[:32]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256(type(tokenizer).__qualname__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _write(
    path: Path, encoded: Callable[[], tuple[Iterator[list[KeptRow]], EncodingReport]], for_teacher: bool
) -> dict[str, Any]:
    """Write rows as they are encoded. Their report counts all of them at the end, and not before."""
    import pyarrow as pa

    lists = pa.list_(pa.int32())
    names = ["input_ids", "learned", *(["teacher_ids", "teacher_learned"] if for_teacher else [])]
    schema = pa.schema([("row_id", pa.string()), *((name, lists) for name in names)])
    blocks, report = encoded()
    columns = (
        [
            pa.array([row_id for row_id, _ in block], pa.string()),
            _list_array([row.ids for _, row in block]),
            _list_array([row.spans for _, row in block]),
            *(_list_array([row.read[part] for _, row in block]) for part in range(2 * for_teacher)),
        ]
        for block in blocks
    )
    write_table(path, schema, columns)
    return {"report": dataclasses.asdict(report)}


def _opened(path: Path, record: Mapping[str, Any]) -> MappedDataset:
    return MappedDataset(path, EncodingReport(**record["report"]))


def _list_array(rows: Sequence[Any]) -> pa.ListArray:
    import pyarrow as pa

    values = np.concatenate([np.asarray(row, np.int32) for row in rows]) if rows else np.zeros(0, np.int32)
    offsets = np.array([0, *accumulate(map(len, rows))], np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


class Lists(Sequence[NDArray[np.int32]]):
    """A column of lists of whole numbers: each row is a view of the mapped file, and nothing is copied.

    Args:
        column: Arrow lists without empty cells.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.parts = [(chunk.values.to_numpy(), chunk.offsets.to_numpy()) for chunk in chunks]
        self.firsts = [0, *accumulate(map(len, chunks))]

    def __len__(self) -> int:
        return self.firsts[-1]

    @overload
    def __getitem__(self, index: int) -> NDArray[np.int32]: ...
    @overload
    def __getitem__(self, index: slice) -> list[NDArray[np.int32]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.int32] | list[NDArray[np.int32]]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        index = range(len(self))[index]
        part = bisect_right(self.firsts, index) - 1
        values, offsets = self.parts[part]
        place = index - self.firsts[part]
        view: NDArray[np.int32] = values[offsets[place] : offsets[place + 1]]
        return view

    def lengths(self) -> list[int]:
        """The length of each row."""
        return [length for _, offsets in self.parts for length in np.diff(offsets).tolist()]


class MappedDataset(EncodedDataset):
    """Encoded rows that stay in their file. A worker of a data loader gets its path, and not its content.

    Args:
        path: of the Arrow file.
        report: what became of the rows.
        count: the first so many; None: all.
    """

    def __init__(self, path: Path, report: EncodingReport | None = None, count: int | None = None) -> None:
        self.path, self.report, self.count = path, report, count
        table = read_table(path).slice(0, count)
        self.row_ids = table.column("row_id").to_pylist()
        ids = Lists(table.column("input_ids"))
        self.ids, self.lengths = ids, ids.lengths()
        self.bounds = Lists(table.column("learned"))
        if "teacher_ids" in table.column_names:
            self.for_teacher = Lists(table.column("teacher_ids")), Lists(table.column("teacher_learned"))
        self.prompt_lengths = [int(start) for values, offsets in self.bounds.parts for start in values[offsets[:-1]]]

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedDataset, (self.path, self.report, self.count), {"teachers": self.teachers}

    def spans(self, index: int) -> list[tuple[int, int]]:
        bounds = self.bounds[index].tolist()
        return list(zip(bounds[::2], bounds[1::2], strict=True))

    @property
    def target_counts(self) -> list[int]:
        counts: list[int] = []
        for values, offsets in self.bounds.parts:
            learned = values[offsets[0] + 1 : offsets[-1] : 2] - values[offsets[0] : offsets[-1] : 2]
            counts += np.add.reduceat(learned, (offsets[:-1] - offsets[0]) // 2).tolist()
        return counts

    def subset(self, n: int) -> EncodedDataset:
        dataset = MappedDataset(self.path, None, n)
        dataset.teachers = None if self.teachers is None else self.teachers[:n]
        return dataset
