"""Encoded rows in files of a cache: written once, then memory-mapped, so that all processes of a machine share them.

A process that finds no file makes it while the others wait for its lock; they, and later runs of the same rows, read it.
Its name is a digest of all that the tokens depend on. A cache only saves work: where it cannot be written or is broken,
rows are encoded as if there were none.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from dts_hf.data.chat_templates import Template
from dts_hf.data.encoding import EncodedDataset, EncodingReport, KeptRow, encode_rows, encoded_blocks, refuse_empty
from dts_hf.data.rows import Row
from dts_hf.files import file_sha256

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Fewer rows are encoded sooner than a file of them is written and checked.
LEAST_ROWS = 1000
FORMAT = 1
ROWS, RECORD = "rows.arrow", "record.json"
#: Seconds that a process waits for another one that encodes the same rows; then it encodes them itself.
PATIENCE = 3600.0


def default_cache() -> Path:
    """``$DTS_HF_CACHE``, else ``$XDG_CACHE_HOME/dts_hf``, else ``~/.cache/dts_hf``."""
    if "DTS_HF_CACHE" in os.environ:
        return Path(os.environ["DTS_HF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dts_hf"


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
        dataset = _locked(place, lambda: encoded_blocks(rows, tokenizer, template, **limits))
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
    # A template that writes today's date makes other tokens tomorrow
    dated = "strftime_now" in json.dumps(getattr(tokenizer, "chat_template", None), default=str)
    described = {
        "format": FORMAT,
        "code": _code(),
        "libraries": [version(library) for library in ("dts_hf", "transformers", "tokenizers", "jinja2")],
        "tokenizer": _tokenizer_digest(tokenizer),
        "template": [template.name, template.is_chat, template.wraps_prompts],
        "limits": limits,
        "day": datetime.date.today().isoformat() if dated else None,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    names = [field.name for field in dataclasses.fields(Row)]
    for row in rows:
        # Keys in their order: a template may write them so
        digest.update(json.dumps([getattr(row, name) for name in names], default=repr).encode() + b"\n")
    return digest.hexdigest()[:32]


@functools.cache
def _code() -> str:
    """Digest of the modules that make tokens of rows: a change that no version number tells makes new files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256(type(tokenizer).__qualname__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _locked(place: Path, make: Any) -> MappedDataset:
    """The rows in ``place``, put there by ``make()`` where they are missing or broken, by one process at a time."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with _lock(place.with_name(f".{place.name}.lock")):
        found = _read(place)
        if found is None:
            unfinished = place.with_name(f".{place.name}.unfinished")  # nobody else's: the lock is held
            for old in (unfinished, place):
                if os.path.lexists(old):
                    shutil.rmtree(old)
            try:
                unfinished.mkdir()
                _write(unfinished, *make())
                os.rename(unfinished, place)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            found = _read(place)
    if found is None:
        raise OSError(f"{place} does not hold what was written")
    return found


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``, which ends with this process at the latest; never through a link.

    Raises:
        OSError: it cannot be had, or another process has held it for ``PATIENCE``.
        NotImplementedError: this system has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise NotImplementedError(str(error)) from None
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield
    finally:
        os.close(file)


def _write(folder: Path, blocks: Iterator[list[KeptRow]], report: EncodingReport) -> None:
    """Write rows as they are encoded, and then, when it counts all of them, their report."""
    import pyarrow as pa

    lists = pa.list_(pa.int32())
    schema = pa.schema([("row_id", pa.string()), ("input_ids", lists), ("learned", lists)])
    with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for block in blocks:
            columns = [
                pa.array([row_id for row_id, _ in block], pa.string()),
                _list_array([row.ids for _, row in block]),
                _list_array([row.spans for _, row in block]),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    record = {"format": FORMAT, "sha256": file_sha256(folder / ROWS), "report": dataclasses.asdict(report)}
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")


def _list_array(rows: Sequence[Any]) -> pa.ListArray:
    import pyarrow as pa

    values = np.concatenate([np.asarray(row, np.int32) for row in rows]) if rows else np.zeros(0, np.int32)
    offsets = np.array([0, *accumulate(map(len, rows))], np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _read(place: Path) -> MappedDataset | None:
    """The rows in ``place``; None where they are missing, cut off, changed or not ours."""
    try:
        record = json.loads((place / RECORD).read_bytes())
        if record["format"] != FORMAT or record["sha256"] != file_sha256(place / ROWS):
            return None
        return MappedDataset(place / ROWS, EncodingReport(**record["report"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


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
        from datasets import Dataset

        self.path, self.report, self.count = path, report, count
        table = Dataset.from_file(str(path)).data.table.slice(0, count)
        self.row_ids = table.column("row_id").to_pylist()
        ids = Lists(table.column("input_ids"))
        self.ids, self.lengths = ids, ids.lengths()
        self.bounds = Lists(table.column("learned"))
        self.prompt_lengths = [int(start) for values, offsets in self.bounds.parts for start in values[offsets[:-1]]]

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedDataset, (self.path, self.report, self.count)

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
        return MappedDataset(self.path, None, n)
