"""Rows that were tokenised elsewhere: checked before training, and read one at a time in the form of our own.

A row is a mapping with unshifted ``input_ids`` and ``labels``: lists, arrays or tensors of one dimension. Tokens that
``attention_mask`` hides at either end of a row are padding and are left out, with their labels. A hole in the middle, and
``position_ids`` that are not 0, 1, 2, ..., would be lost in our batches and are refused.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dts_hf.data.encoding import EncodedDataset, EncodingReport
from dts_hf.data.routes import TEACHER, Routing
from dts_hf.data.samplers import DUMMY_ROW
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX, count_targets

COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
BLOCK = 2000  # rows that are checked together
#: Formats of a ``datasets.Dataset`` that give a table of one row for a row.
TABLES = ("arrow", "pandas", "polars")
EXPECTED_LABELS = (
    f"labels (unshifted, as long as input_ids, {IGNORE_INDEX} where nothing is to be learned), or "
    "data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), which makes a label of every token"
)


class Flat(NamedTuple):
    """A column of several rows: their entries one after the other, and how many each row has."""

    values: NDArray[Any]
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class RowForm:
    """What the rows of one data set must be.

    Attributes:
        name: of the data set, in errors.
        vocab_size: ids that teacher and student share.
        as_they_are: they go to a collator of the user's, which gets every column and answers for masks and positions.
        labelled: they bring labels; otherwise that collator makes them.
        row_ids: their ids, where they have some.
        routing: how they name their teacher, where there are several.
    """

    name: str
    vocab_size: int
    as_they_are: bool = False
    labelled: bool = True
    row_ids: Sequence[str] | None = None
    routing: Routing | None = None

    def place(self, number: int) -> str:
        """What errors call the row of this number."""
        named = "" if self.row_ids is None else f" (id '{self.row_ids[number]}')"
        return f"{self.name}: row {number}{named}"

    def read(self, row: Mapping[str, Any], row_id: int) -> dict[str, Any]:
        """A row that has been checked, without its padding."""
        if self.as_they_are:
            dropped = set() if self.labelled else {"labels"}  # which may be there as None
            dropped |= set() if self.routing is None else {self.routing.column}  # a text, which makes no tensor
            return {**{name: cell for name, cell in row.items() if name not in dropped}, "row_id": row_id}
        ids, labels, mask = (_listed(row.get(column)) for column in ("input_ids", "labels", "attention_mask"))
        if mask is not None:
            start, end = mask.index(1), len(mask) - mask[::-1].index(1)
            ids, labels = ids[start:end], labels[start:end]
        return {"input_ids": ids, "labels": labels, "row_id": row_id}

    def teacher(self, row: Any, number: int) -> int:
        """The number of the teacher that a row names.

        Raises:
            UserError: it names none, or one that there is not.
        """
        assert self.routing is not None
        value = row.get(self.routing.column) if isinstance(row, Mapping) else None
        return self.routing.number(value, self.place(number))

    def columns(self, rows: Sequence[Any], first: int) -> dict[str, Flat]:
        """The columns of ``rows``, the first of which has the number ``first``.

        Raises:
            UserError: one is missing in a row, or holds no whole numbers.
        """
        for number, row in enumerate(rows, first):
            if not isinstance(row, Mapping):
                raise UserError(f"{self.place(number)} is {type(row).__name__}, expected input_ids and labels by name")
        flat = {}
        for column in self._wanted():
            cells = [row.get(column) for row in rows]
            quick = _flat_lists(cells)
            if quick is not None:
                flat[column] = quick
            elif column in ("input_ids", "labels") or any(cell is not None for cell in cells):
                parts = [self._array(row, column, number) for number, row in enumerate(rows, first)]
                flat[column] = Flat(np.concatenate(parts), np.array([len(part) for part in parts]))
        return flat

    def arrow_columns(self, table: Any) -> dict[str, Flat] | None:
        """The same of an Arrow table, without a Python object for each number; None where it is not all whole numbers."""
        import pyarrow as pa

        flat = {}
        for column in self._wanted():
            if column not in table.column_names or table[column].null_count == len(table):
                if column in ("input_ids", "labels"):
                    return None
                continue
            lists = table[column].combine_chunks()
            if not hasattr(lists, "flatten") or lists.null_count:
                return None
            values = lists.flatten()
            if not pa.types.is_integer(values.type) or values.null_count:
                return None
            lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
            flat[column] = Flat(values.to_numpy(zero_copy_only=False), lengths)
        return flat

    def _wanted(self) -> list[str]:
        return [column for column in COLUMNS if column != "labels" or self.labelled]

    def _array(self, row: Mapping[str, Any], column: str, number: int) -> NDArray[Any]:
        cell = row.get(column)
        if cell is None and column in ("input_ids", "labels"):
            found = ", ".join(f"'{key}'" for key, value in row.items() if value is not None)
            expected = EXPECTED_LABELS if column == "labels" else "tokens of the student's tokenizer"
            raise UserError(f"{self.place(number)} has no {column}, but {found}; expected {expected}")
        if cell is None:  # other rows have it: as if it said nothing
            return (np.ones if column == "attention_mask" else np.arange)(len(row["input_ids"]), dtype=np.int64)
        try:
            values = np.asarray(cell.cpu() if isinstance(cell, Tensor) else cell)
        except ValueError:  # lists of different lengths
            values = np.empty((0, 0))
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iub"):
            found = repr(cell) if values.ndim == 0 else f"an array {list(values.shape)} of {values.dtype}"
            raise UserError(f"{self.place(number)}: {column} is {found}, expected a list of whole numbers")
        return values if values.size else np.zeros(0, np.int64)

    def check(self, columns: Mapping[str, Flat], first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Look at all rows of ``columns`` at once.

        Args:
            columns: as ``columns`` or ``arrow_columns`` gives them.
            first: the number of the first row, for errors.

        Returns:
            tokens and targets of each row, without its padding, int64 ``[rows]``.

        Raises:
            UserError: names the first row that is wrong.
        """
        ids, lengths = columns["input_ids"]
        for column, flat in columns.items():
            row = _first(flat.lengths != lengths)
            if row is not None:
                raise UserError(
                    f"{self.place(first + row)} has {flat.lengths[row]} {column} for {lengths[row]} input_ids, "
                    "expected as many"
                )
        labels, mask, positions = (columns[column].values if column in columns else None for column in COLUMNS[1:])
        if mask is not None and not self.as_they_are and not (mask == 1).all():
            lengths, shown = self._unmasked(mask, lengths, first)
            ids = ids[shown]
            labels, positions = (None if part is None else part[shown] for part in (labels, positions))
        row = _first(lengths == 0)
        if row is not None:
            hidden = " that attention_mask does not hide" if mask is not None else ""
            raise UserError(f"{self.place(first + row)} has no token{hidden}; leave it out")
        starts = lengths.cumsum() - lengths
        if positions is not None and not self.as_they_are:
            expected = np.arange(len(ids)) - starts.repeat(lengths)
            at = _first(positions != expected)
            if at is not None:
                raise UserError(
                    f"{self.place(first + _row_of(at, lengths))}: position_ids has {positions[at]} where {expected[at]} "
                    "is expected: positions are counted from the first token of a row. Leave the column out, and give "
                    "packed rows apart, with packing=True"
                )
        self._check_ids(ids, 0, lengths, first)
        if labels is None:  # the collator makes one of every token
            return lengths, lengths - 1
        learned = labels != IGNORE_INDEX
        self._check_ids(labels, len(labels) - np.count_nonzero(learned), lengths, first)
        learned[starts] = False  # nothing predicts the first token of a row
        return lengths, np.add.reduceat(learned, starts, dtype=np.int64)

    def content(self, columns: Mapping[str, Flat], first: int) -> bytes:
        """What is trained on of rows that ``check`` has passed, for a checksum: however they are padded and stored."""
        ids, lengths = columns["input_ids"]
        parts = [columns[column].values for column in COLUMNS if column in columns]
        if not self.as_they_are:  # what the mask hides and positions that count are no difference
            parts = [ids, columns["labels"].values]
            mask = columns["attention_mask"].values if "attention_mask" in columns else None
            if mask is not None and not (mask == 1).all():
                lengths, shown = self._unmasked(mask, lengths, first)
                parts = [part[shown] for part in parts]
        return b"".join(np.asarray(part, np.int64).tobytes() for part in (lengths, *parts))

    def _unmasked(
        self, mask: NDArray[Any], lengths: NDArray[np.int64], first: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Lengths without what the mask hides, and which tokens it shows."""
        at = _first((mask != 0) & (mask != 1))
        if at is not None:
            raise UserError(
                f"{self.place(first + _row_of(at, lengths))}: attention_mask has {mask[at]}, expected 0 and 1"
            )
        shown, row_of = mask == 1, np.arange(len(lengths)).repeat(lengths)
        begins = shown.copy()
        begins[1:] &= ~shown[:-1] | (row_of[1:] != row_of[:-1])
        row = _first(np.bincount(row_of[begins], minlength=len(lengths)) > 1)
        if row is not None:
            raise UserError(
                f"{self.place(first + row)}: attention_mask hides tokens between others, expected zeros at the ends of "
                "a row alone, which are padding"
            )
        return np.bincount(row_of[shown], minlength=len(lengths)), shown

    def _check_ids(self, tokens: NDArray[Any], ignored: int, lengths: NDArray[np.int64], first: int) -> None:
        """``ignored`` of the tokens are ``IGNORE_INDEX``, and may be."""
        tokens = tokens.astype(np.int64) if tokens.dtype.itemsize < 4 else tokens  # below zero is to be above all ids
        whole = tokens.view(tokens.dtype.str.replace("i", "u")) if tokens.dtype.kind == "i" else tokens
        if np.count_nonzero(whole >= self.vocab_size) == ignored:  # one pass: below zero is above all others there
            return
        wrong = (tokens < 0) | (tokens >= self.vocab_size)
        at = _first(wrong & (tokens != IGNORE_INDEX) if ignored else wrong)
        assert at is not None
        raise UserError(
            f"{self.place(first + _row_of(at, lengths))}: token id {tokens[at]} is outside the {self.vocab_size:,} ids "
            f"that teacher and student share (a label may also be {IGNORE_INDEX}). A token that was added to one of them "
            "alone means nothing to the other: add it to both, or leave such rows out"
        )


class TokenisedDataset(Dataset[dict[str, Any]]):
    """The rows of a map-style data set, a list or a ``datasets.Dataset``; all are checked when it is made.

    Args:
        rows: the data set. Arrow columns are checked as they lie there; otherwise each row is read once.
        form: what the rows must be.
        first_reading: all rows in order, where reading them has begun already.

    Attributes:
        lengths: tokens of each row, without padding.
        report: what became of the rows.
        teachers: the number of each row's teacher; None: there are not several.
        digest: a checksum over all rows, without their padding; of rows for a collator of the user's, over tokens, labels,
            mask and positions. None where a row is another one each time that it is read.
    """

    def __init__(self, rows: Any, form: RowForm, first_reading: Iterable[Any] | None = None) -> None:
        self.rows, self.form = rows, form
        self.teachers: list[int] | None = None if form.routing is None else []
        if has_arrow_rows(rows):
            if form.routing is not None:
                column = form.routing.column
                values = rows.with_format(None)[column] if column in rows.column_names else [None] * len(rows)
                self.teachers = [form.teacher({column: value}, number) for number, value in enumerate(values)]
            blocks = _arrow_blocks(rows, form)
            if not form.as_they_are:  # whatever their format: our batches are made of lists
                columns = [column for column in COLUMNS if column in rows.column_names]
                self.rows = rows.select_columns(columns).with_format(None)
        else:
            blocks = _blocks(form, self._routed(rows_of(rows) if first_reading is None else first_reading))
        self.lengths: list[int] = []
        targets, xxh3 = [], xxhash.xxh3_64()
        for block in blocks:
            lengths, of_block = form.check(block, len(self.lengths))
            xxh3.update(form.content(block, len(self.lengths)))
            self.lengths += lengths.tolist()
            targets.append(of_block)
        self.report = report_of(np.array(self.lengths), np.concatenate(targets or [np.zeros(0, np.int64)]), form.name)
        self.digest = f"xxh3:{xxh3.hexdigest()}" if has_arrow_rows(rows) or self._stays() else None

    def _stays(self) -> bool:
        """Whether some of the rows are the same when they are read again."""
        some = sorted({*range(0, len(self), max(len(self) // 4, 1)), len(self) - 1})
        once, again = (
            [self.form.content(self.form.columns([self.rows[index]], index), index) for index in some]
            for _ in range(2)
        )
        return once == again

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        row = self.form.read(self.rows[index], index)
        return row if self.teachers is None else {**row, TEACHER: self.teachers[index]}

    def _routed(self, rows: Iterable[Any]) -> Iterator[Any]:
        """``rows``, whose teachers are noted as they go by."""
        for number, row in enumerate(rows):
            if self.teachers is not None:
                self.teachers.append(self.form.teacher(row, number))
            yield row


@dataclass
class NumberedCollator:
    """A collator of the user's, which sees neither ``row_id``, teacher nor dummy_rows; all come back in its batch.

    Where it pads on the left, the first token of a row has no label: only the padding before it would predict it.

    Args:
        collator: rows to a batch.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        real = [example for example in examples if example["row_id"] != DUMMY_ROW]
        chosen = real or examples[:1]
        ours = [name for name in ("row_id", TEACHER) if name in chosen[0]]
        rows = [{name: value for name, value in example.items() if name not in ours} for example in chosen]
        batch = dict(self.collator(rows))
        if not real:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        batch |= _without_first_tokens(batch)
        return {**batch, **{name: torch.tensor([example[name] for example in chosen]) for name in ours}}


def _without_first_tokens(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The labels ``[B, T]`` of a batch without those behind padding on the left, where it has some."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if not (isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.shape == mask.shape):
        return {}
    padding = mask.cumsum(1) == 0
    if not padding.any():
        return {}
    behind = torch.zeros_like(padding)
    behind[:, 1:] = padding[:, :-1]
    return {"labels": labels.masked_fill(behind, IGNORE_INDEX)}


#: In a batch: how many of its labels count, a number on the host.
NUM_LABELS = "num_labels"


@dataclass
class CountingCollator:
    """Counts the labels of a batch while they are on the host; on a GPU, asking for their number would wait for it.

    Args:
        collator: rows to a batch with ``labels`` ``[B, T]``.
    """

    collator: Callable[[Sequence[Any]], Mapping[str, Any]]

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        batch = dict(self.collator(examples))
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and labels.dim() == 2 and labels.is_cpu:
            batch[NUM_LABELS] = int(count_targets(labels))
        return batch


def rows_of(dataset: Any) -> Iterator[Any]:
    """All rows in order, each read once; by number where a data set has no iterator, for few of those end by themselves."""
    return iter(dataset) if hasattr(dataset, "__iter__") else (dataset[index] for index in range(len(dataset)))


def has_arrow_rows(dataset: Any) -> bool:
    """Whether it is a ``datasets.Dataset`` whose rows are what its columns say, and not made by a transform."""
    return hasattr(dataset, "column_names") and getattr(dataset, "format", {}).get("type", "custom") != "custom"


def check_encoded(dataset: EncodedDataset, form: RowForm) -> EncodingReport:
    """Check rows that ``encode_rows`` has made, or somebody by hand.

    Raises:
        UserError: a token is outside the vocabulary, or no row has a label.
    """
    lengths, targets = np.array(dataset.lengths), np.array(dataset.target_counts)
    form = dataclasses.replace(form, row_ids=dataset.row_ids)
    for first in range(0, len(lengths), BLOCK):  # all at once would be a copy of all tokens
        ids = np.concatenate([np.asarray(row) for row in dataset.ids[first : first + BLOCK]])
        form.check({"input_ids": Flat(ids, lengths[first : first + BLOCK])}, first)
    return report_of(lengths, targets, form.name, dataset.row_ids)


def report_of(
    lengths: NDArray[np.int64], targets: NDArray[np.int64], name: str, row_ids: Sequence[str] | None = None
) -> EncodingReport:
    """Count rows, their tokens, and the rows without a label.

    Args:
        lengths: tokens of each row, ``[rows]``.
        targets: labels that count of each row, ``[rows]``.
        name: of the data set, in errors.
        row_ids: the ids of the rows, where they have some.

    Raises:
        UserError: no row is there, or none of them has a label.
    """
    silent = np.flatnonzero(targets <= 0)
    if not len(lengths):
        raise UserError(f"{name}: there are no rows in it")
    if len(silent) == len(lengths):
        raise UserError(
            f"{name}: none of its {len(lengths):,} rows has a label that counts (not {IGNORE_INDEX}, and not at the first "
            "token of a row, which nothing predicts), so there is nothing to learn from or to measure"
        )
    learned = int(targets.clip(min=0).sum())
    return EncodingReport(
        rows=len(lengths),
        kept=len(lengths),
        unlabelled=len(silent),
        unlabelled_ids=[str(row) if row_ids is None else row_ids[row] for row in silent[:5].tolist()],
        prompt_tokens=int(lengths.sum()) - learned,
        response_tokens=learned,
    )


def _arrow_blocks(rows: Any, form: RowForm) -> Iterator[dict[str, Flat]]:
    columns = [column for column in COLUMNS if column in rows.column_names]
    first = 0
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=BLOCK):
        # Other types and empty cells are for the slow way: it knows in which row they are.
        yield form.arrow_columns(table) or form.columns(table.to_pylist(), first)
        first += len(table)


def _blocks(form: RowForm, rows: Iterable[Any]) -> Iterator[dict[str, Flat]]:
    rows, first = iter(rows), 0
    while block := list(islice(rows, BLOCK)):
        yield form.columns(block, first)
        first += len(block)


def _flat_lists(cells: Sequence[Any]) -> Flat | None:
    """The cells as one column, quickly; None unless they are lists of whole numbers."""
    values = array("q")
    try:
        for cell in cells:
            values.fromlist(cell)
    except (TypeError, OverflowError):
        return None
    return Flat(np.asarray(values), np.fromiter(map(len, cells), np.int64, len(cells)))


def _first(condition: NDArray[np.bool_]) -> int | None:
    """Where it first holds."""
    return int(condition.argmax()) if condition.any() else None


def _row_of(at: int, lengths: NDArray[np.int64]) -> int:
    """The row that holds entry ``at`` of a ``Flat`` column."""
    return int(np.searchsorted(lengths.cumsum(), at, side="right"))


def _listed(cell: Any) -> Any:
    return cell if cell is None else cell.tolist() if hasattr(cell, "tolist") else list(cell)
