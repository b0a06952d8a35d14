"""Streams: rows that come one after the other, and nobody knows how many; encoded or checked on the way, and counted.

Every process reads and encodes the whole stream and takes its share of what is left. So the rows of an optimizer step are
those of a list on any number of processes, whichever rows are too long, and all come to the end at the same step without
asking each other. Text is encoded far faster than a model trains on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from dts_hf.data.encoding import EncodedDataset, EncodingReport
from dts_hf.data.formats import parse_row
from dts_hf.data.rows import Row
from dts_hf.data.tokenised import RowForm
from dts_hf.errors import UserError

BLOCK = 128  # rows that are encoded and checked together, so that many are read ahead
NAMED = 5  # rows that a report names
NAME_BYTES = 80  # of such a name, as UTF-8
COUNTS = ("rows", "kept", "dropped", "cut", "prompts_cut", "ignored", "unlabelled", "prefixed",
          "teacher_too_long", "prompt_tokens", "response_tokens")  # fmt: skip

#: Makes tokens of rows whose ids are their numbers in the stream; none of them has to be left.
EncodeBlock = Callable[[Sequence[Row]], tuple[EncodedDataset, EncodingReport]]


class SharedCounts:
    """Counts in shared memory: a data loader's worker, which is another process, reads the rows and counts them.

    Attributes:
        epoch: the pass over the rows; a worker that lives on over the epochs is told here.
        kept_in_pass: rows that the pass has given so far.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(len(COUNTS), dtype=torch.int64).share_memory_()
        self._dropped, self._unlabelled = (
            torch.zeros(NAMED, NAME_BYTES, dtype=torch.uint8).share_memory_() for _ in range(2)
        )
        self.epoch, self.kept_in_pass = (torch.zeros((), dtype=torch.int64).share_memory_() for _ in range(2))

    @property
    def rows(self) -> int:
        return int(self._counts[0])

    def add(self, block: EncodingReport) -> None:
        """Count a block."""
        before = self._counts.tolist()
        for ids, names, counted in (
            (block.dropped_ids, self._dropped, before[COUNTS.index("dropped")]),
            (block.unlabelled_ids, self._unlabelled, before[COUNTS.index("unlabelled")]),
        ):
            for place, name in enumerate(ids[: max(0, NAMED - counted)], counted):
                written = name.encode("utf-8", "replace")[:NAME_BYTES]
                names[place, : len(written)] = torch.tensor(list(written), dtype=torch.uint8)
        self._counts += torch.tensor([getattr(block, name) for name in COUNTS])

    def read_into(self, report: EncodingReport) -> None:
        """Bring ``report`` up to date."""
        for name, count in zip(COUNTS, self._counts.tolist(), strict=True):
            setattr(report, name, count)
        for names, count, ids in (
            (self._dropped, report.dropped, report.dropped_ids),
            (self._unlabelled, report.unlabelled, report.unlabelled_ids),
        ):
            written = (bytes(name).rstrip(b"\0") for name in names[: min(count, NAMED)].tolist())
            ids[:] = [name.decode("utf-8", "ignore") for name in written]  # the last character may be cut


class Sample(list[dict[str, Any]]):
    """Rows as tokens that stand for those of a stream."""

    @property
    def lengths(self) -> list[int]:
        return [len(row["input_ids"]) for row in self]


class RowStream(IterableDataset[dict[str, Any]]):
    """The rows of an iterable data set as tokens, each checked as it comes; ``row_id`` is its number in the stream.

    Args:
        source: gives its rows anew each time that it is iterated over, and knows ``set_epoch`` if it shuffles by epoch.
        first: its first row, which has been read already; None: there is none.
        form: what the rows must be as tokens.
        encode: makes tokens of text; None: the rows bring tokens.
        columns: of text, see ``parse_row``.
        positions: tokens that the models have room for in one row, and which of them has least; None: no limit.

    Attributes:
        report: what became of the rows that were read so far; ``refresh`` brings it up to date. A later pass over the same
            rows is not counted again.
        first_row: a digest of the first row, which is the same on all processes and after a resume.

    Raises:
        UserError: there is no row, or the first one is wrong.
    """

    def __init__(
        self,
        source: Any,
        first: Any,
        form: RowForm,
        encode: EncodeBlock | None = None,
        columns: Mapping[str, str | None] | None = None,
        positions: tuple[int, str] | None = None,
    ) -> None:
        self.source, self.form, self.encode, self.columns, self.positions = source, form, encode, columns, positions
        self.report, self.counts = EncodingReport(), SharedCounts()
        if first is None:
            raise UserError(f"{form.name}: there are no rows in it")
        self._first = first
        rows, report = self._ready([first], 0)
        self.report.template = report.template
        tokens = {column: rows[0].get(column) for column in ("input_ids", "labels")} if rows else None
        self.first_row = digest(tokens or first)  # as a list or as an array: the same row

    def sample(self) -> Sample:
        """The first row, to try a collator of the user's out on; nothing where it is too long."""
        return Sample(self._ready([self._first], 0)[0])

    def set_epoch(self, epoch: int) -> None:
        """Begin this pass next."""
        self.counts.epoch.fill_(epoch)

    def refresh(self) -> EncodingReport:
        """``report``, with what was read since."""
        self.counts.read_into(self.report)
        return self.report

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(int(self.counts.epoch))
        self.counts.kept_in_pass.zero_()
        source, of_pass = iter(self.source), EncodingReport()
        while block := list(islice(source, BLOCK)):
            rows, report = self._ready(block, of_pass.rows)
            if of_pass.rows == self.counts.rows:  # an earlier pass has not been as far
                self.counts.add(report)
            for name in COUNTS:
                setattr(of_pass, name, getattr(of_pass, name) + getattr(report, name))
            self.counts.kept_in_pass += len(rows)
            yield from rows
        self._check_pass(of_pass)

    def _check_pass(self, of_pass: EncodingReport) -> None:
        """A pass that gives nothing to learn from would be followed by the next for ever, or end in success."""
        name = self.form.name
        if not of_pass.rows:
            raise UserError(
                f"{name}: gave rows once, and none when it was read again; expected one that begins anew each time"
            )
        if not of_pass.kept:
            raise UserError(
                f"{name}: no row left: all {of_pass.rows:,} rows are too long (data.max_length, data.max_prompt_length, in "
                "tokens). Raise the limits, or cut them (data.long_rows: cut)"
            )
        if of_pass.unlabelled == of_pass.kept:
            raise UserError(f"{name}: none of its {of_pass.kept:,} rows has a label that counts")

    def _ready(self, block: Sequence[Any], first: int) -> tuple[list[dict[str, Any]], EncodingReport]:
        """Rows as tokens, checked, and what became of them; the first one has the number ``first``."""
        if self.encode is None:
            lengths, targets = self.form.check(self.form.columns(block, first), first)
            numbers: Sequence[int] = range(first, first + len(block))
            rows = [self.form.read(row, number) for number, row in zip(numbers, block, strict=True)]
            report = EncodingReport(rows=len(block), kept=len(block))
            report.response_tokens = int(targets.clip(min=0).sum())
            report.prompt_tokens = int(lengths.sum()) - report.response_tokens
            own = {}
        else:
            parsed = [self._parsed(row, number) for number, row in enumerate(block, first)]
            own = {number: row.id for number, row in enumerate(parsed, first) if row.id != str(number)}
            # By its number a row is found again among those that are left: its own id may be there twice
            dataset, report = self.encode(
                [dataclasses.replace(row, id=str(number)) for number, row in enumerate(parsed, first)]
            )
            report.dropped_ids = [self._name(int(number), own) for number in report.dropped_ids]
            numbers = [int(name) for name in dataset.row_ids]
            rows = [{**dataset[place], "row_id": number} for place, number in enumerate(numbers)]
            lengths, targets = self._check_encoded(rows, [str(number + 1) for number in numbers])
        if self.positions is not None and len(lengths) and lengths.max() > self.positions[0]:
            place = int(lengths.argmax())
            raise UserError(
                f"{self._place(numbers[place])} has {lengths[place]:,} tokens, but {self.positions[1]} has "
                f"{self.positions[0]:,} positions; shorten the rows (data.max_length)"
            )
        silent = [numbers[place] for place in np.flatnonzero(targets <= 0).tolist()]
        report.unlabelled, report.unlabelled_ids = len(silent), [self._name(number, own) for number in silent[:NAMED]]
        return rows, report

    def _check_encoded(self, rows: Sequence[dict[str, Any]], ids: Sequence[str]) -> tuple[Any, Any]:
        """Tokens and targets of each row, int64 ``[rows]``."""
        if not rows:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        form = dataclasses.replace(self.form, labelled=True, row_ids=ids)
        return form.check(form.columns(rows, 0), 0)

    def _parsed(self, row: Any, number: int) -> Row:
        return row if isinstance(row, Row) else parse_row(row, self._place(number), str(number), self.columns)

    def _name(self, number: int, own: Mapping[int, str]) -> str:
        """What a report calls a row: its own id, which a shuffled stream does not change, else its place."""
        return own.get(number) or f"row {number + (self.encode is not None)}"  # text is counted from 1, as in files

    def _place(self, number: int) -> str:
        return f"{self.form.name}: {self._name(number, {})}"


def digest(row: Any) -> str:
    """Sixteen characters that tell one row from another."""

    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else type(value).__name__

    content = dataclasses.asdict(row) if isinstance(row, Row) else row
    content = {str(key): value for key, value in content.items()} if isinstance(content, Mapping) else content
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=plain).encode()).hexdigest()[:16]


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """A ``UserError`` of a data loader's worker comes without the traceback that PyTorch puts around it.

    Raises:
        UserError: the same, with its own words.
    """
    try:
        yield
    except UserError as error:
        if "in DataLoader worker process" not in str(error):
            raise
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
