"""Rows as tokens: prompt and response under a length limit, and a report of what was dropped or cut."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np
import xxhash
from torch.utils.data import Dataset

from dts_hf.alignment.batch import AlignedRow
from dts_hf.data.chat_templates import Template, is_dated
from dts_hf.data.row_encoder import EncodedRow, RowEncoder
from dts_hf.data.rows import Row
from dts_hf.data.targets import TextCutter, TrainOn
from dts_hf.data.teacher_rows import TeacherRows
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: The id of a row, and the row as tokens.
KeptRow: TypeAlias = tuple[str, EncodedRow]


class _Tokens(TypedDict):
    input_ids: list[int]
    labels: list[int]
    row_id: int


class Example(_Tokens, total=False):
    """One tokenised row: ``labels`` are ``input_ids`` with -100 on the prompt; ``row_id`` indexes the data set.

    ``teacher_number`` is there where rows have one of several teachers (``routes.Routing``), ``teacher_input_ids`` and
    ``teacher_labels`` where the teacher reads more than the student (``teacher_context``), ``aligned`` where it has another
    tokenizer.
    """

    teacher_number: int
    teacher_input_ids: list[int]
    teacher_labels: list[int]
    aligned: AlignedRow


class EncodedDataset(Dataset[Example]):
    """Tokenised rows and which of their tokens are learned, held as compact arrays.

    Args:
        row_ids: the id of each row.
        ids: the tokens of each row.
        prompt_lengths: how many tokens of each row come before the first that is learned, at least 1.
        spans: by the number of a row, the starts and ends of what is learned: ``[start, end, start, end, ...]``; of a row
            that is not there everything behind its prompt.

    Attributes:
        lengths: tokens of each row.
        report: what became of the rows when they were encoded; None for tokens that come from elsewhere.
        teachers: the number of each row's teacher (``routes.Routing``); None: the rows name none.
        for_teacher: tokens, and bounds as in ``spans``, of each row as its teacher reads it; None: as the student does.
        aligned: each row as a teacher with another tokenizer reads it (``alignment.rows.RowAligner``); None: there is none.
    """

    report: EncodingReport | None = None
    teachers: list[int] | None = None
    for_teacher: tuple[Sequence[Any], Sequence[Any]] | None = None
    aligned: list[AlignedRow] | None = None

    def __init__(
        self,
        row_ids: Sequence[str],
        ids: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        spans: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.row_ids = list(row_ids)
        self.prompt_lengths = list(prompt_lengths)
        self.lengths = [len(row) for row in ids]
        self.ids: Sequence[Any] = [row if isinstance(row, array) else array("i", row) for row in ids]
        self._spans = {row: array("i", bounds) for row, bounds in (spans or {}).items()}

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]  # negative indices count from the end; row_id is always the place
        ids = self.ids[index].tolist()
        row: Example = {"input_ids": ids, "labels": _labels(ids, self.spans(index)), "row_id": index}
        if self.teachers is not None:
            row["teacher_number"] = self.teachers[index]
        if self.for_teacher is not None:
            row["teacher_input_ids"] = read = self.for_teacher[0][index].tolist()
            row["teacher_labels"] = _labels(read, self.teacher_spans(index))
        if self.aligned is not None:
            row["aligned"] = self.aligned[index]
        return row

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Where the tokens of a row are learned: (first, behind the last) of each stretch, in order."""
        bounds = self._spans.get(index)
        if bounds is None:
            return [(self.prompt_lengths[index], self.lengths[index])]
        return _pairs(bounds)

    def teacher_spans(self, index: int) -> list[tuple[int, int]]:
        """As ``spans``, of a row as its teacher reads it."""
        return self.spans(index) if self.for_teacher is None else _pairs(self.for_teacher[1][index])

    @property
    def target_counts(self) -> list[int]:
        """How many tokens of each row are learned."""
        # Nothing predicts the first token of a row, whatever its label
        counts = [length - max(prompt, 1) for length, prompt in zip(self.lengths, self.prompt_lengths, strict=True)]
        for index in self._spans:
            counts[index] = sum(stop - start for start, stop in self.spans(index))
        return counts

    @cached_property
    def digest(self) -> str | None:
        """A checksum over the tokens of all rows, which are learned, and the rows' teachers; None: the template is dated."""
        if self.report is not None and self.report.dated:
            return None
        xxh3 = xxhash.xxh3_64()
        for index, ids in enumerate(self.ids):
            xxh3.update(np.asarray(ids, np.int32).tobytes())
            xxh3.update(repr(self.spans(index)).encode())
        if self.teachers is not None:
            xxh3.update(np.asarray(self.teachers, np.int32).tobytes())
        for read, bounds in zip(*self.for_teacher, strict=True) if self.for_teacher is not None else ():
            xxh3.update(np.asarray(read, np.int32).tobytes() + repr(_pairs(bounds)).encode())
        for row in self.aligned or ():
            for part in (row.ids, row.labels, row.student, row.teacher):
                xxh3.update(part.tobytes())
        return f"xxh3:{xxh3.hexdigest()}"

    def subset(self, n: int) -> EncodedDataset:
        """Return the first ``n`` rows (all of them when there are fewer)."""
        spans = {index: bounds for index, bounds in self._spans.items() if index < n}
        dataset = EncodedDataset(self.row_ids[:n], self.ids[:n], self.prompt_lengths[:n], spans)
        dataset.teachers = None if self.teachers is None else self.teachers[:n]
        if self.for_teacher is not None:
            dataset.for_teacher = self.for_teacher[0][:n], self.for_teacher[1][:n]
        dataset.aligned = None if self.aligned is None else self.aligned[:n]
        return dataset

    @property
    def teacher_lengths(self) -> list[int]:
        """Tokens of each row as its teacher reads it."""
        if self.aligned is not None:
            return [len(row.ids) for row in self.aligned]
        return self.lengths if self.for_teacher is None else [len(ids) for ids in self.for_teacher[0]]


def _pairs(bounds: Sequence[int]) -> list[tuple[int, int]]:
    found = [int(bound) for bound in bounds]
    return list(zip(found[::2], found[1::2], strict=True))


def _labels(ids: list[int], spans: Iterable[tuple[int, int]]) -> list[int]:
    labels = [IGNORE_INDEX] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return labels


@dataclass
class EncodingReport:
    """What became of the rows.

    Attributes:
        rows, kept, dropped: counts of rows; ``rows == kept + dropped``.
        cut: rows whose end was cut, so that the last response lacks its end of turn.
        prompts_cut: rows whose input was shortened to fit ``max_prompt_length``.
        ignored: rows kept of which the chat template leaves something out, such as their tools.
        ignored_example: the first such part.
        unlabelled: rows kept of which no label counts, so that nothing is learned from them.
        prefixed: rows kept before which the teacher reads a text of its own.
        teacher_too_long: rows that fit, but not behind that text: dropped, or cut, and counted there, too.
        dropped_ids, unlabelled_ids: the first five ids of such rows (of tokenised rows: their numbers, from 0).
        prompt_tokens, response_tokens: tokens kept; those of responses carry the labels.
        template: the prompt template that worded them, by its own name.
        dated: the chat template writes the day, so that tomorrow's tokens are others.
    """

    rows: int = 0
    kept: int = 0
    dropped: int = 0
    cut: int = 0
    prompts_cut: int = 0
    ignored: int = 0
    unlabelled: int = 0
    prefixed: int = 0
    teacher_too_long: int = 0
    dropped_ids: list[str] = field(default_factory=list)
    unlabelled_ids: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    response_tokens: int = 0
    template: str = field(default="", compare=False)
    dated: bool = field(default=False, compare=False)
    ignored_example: str = field(default="", compare=False)

    @property
    def is_whole(self) -> bool:
        """Whether every row is learned from as it was given."""
        return not (self.dropped or self.cut or self.prompts_cut or self.ignored or self.unlabelled)

    def summary(self) -> str:
        """Return one line for people."""
        parts = [f"{self.kept:,} of {self.rows:,} rows kept"]
        if self.dropped:
            parts.append(f"dropped as too long: {self.dropped:,} ({_first_of(self.dropped_ids, self.dropped)})")
        if self.unlabelled:
            parts.append(
                f"without a label that counts: {self.unlabelled:,} ({_first_of(self.unlabelled_ids, self.unlabelled)})"
            )
        if self.teacher_too_long:
            parts.append(f"too long only behind the teacher's text: {self.teacher_too_long:,}")
        if self.prefixed:
            parts.append(f"the teacher reads a text before {self.prefixed:,}")
        if self.cut:
            parts.append(f"responses cut: {self.cut:,}")
        if self.prompts_cut:
            parts.append(f"inputs shortened: {self.prompts_cut:,}")
        if self.ignored:
            example = f" (such as {self.ignored_example})" if self.ignored_example else ""
            parts.append(f"the chat template leaves something out of {self.ignored:,}{example}")
        parts.append(f"{self.prompt_tokens:,} prompt and {self.response_tokens:,} response tokens")
        return "; ".join(parts)


def _first_of(ids: Sequence[str], count: int) -> str:
    return ", ".join(ids) + (", ..." if count > len(ids) else "")


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_length: int,
    max_prompt_length: int,
    long_rows: str = "drop",
    train_on: TrainOn | None = None,
    progress: str | None = None,
    name: str = "data",
    may_be_empty: bool = False,
) -> tuple[EncodedDataset, EncodingReport]:
    """Tokenise rows, with labels on what is learned: ``TextCutter`` says what that is, and docs/targets.md shows it.

    What is read and what is learned are tokenised apart, so the first token of a response never depends on the last
    characters before it, and generation starts from the very tokens that training saw.

    Args:
        rows: the rows; ``row.response`` is the one trained on.
        tokenizer: the student's tokenizer; its ``eos_token`` ends the last response, and is learned, where a chat template
            writes no end of turn of its own, also when it is the padding token as well.
        template: from ``resolve_template``.
        max_length: limit of a row in tokens.
        max_prompt_length: limit of what comes before the first token that is learned; below ``max_length``. Longer ones
            have the row's *input* shortened; a row without one, or that does not fit even then, is dropped.
        long_rows: ``"drop"`` rows longer than ``max_length``, or ``"cut"`` them (the end is lost with it). A row of which
            nothing that is learned is left is dropped.
        train_on: which turns are learned; see ``TextCutter``.
        progress: the title of a progress bar on stderr, shown for more than 2,000 rows; None shows none.
        name: what errors call these rows, such as ``data.train``.
        may_be_empty: no row has to be left, for the rows are some of many.

    Raises:
        UserError: limits that contradict each other, a tokenizer without an end-of-sequence token, a row that the template
            cannot hold, no row left.
    """
    blocks, report = encoded_blocks(
        rows, tokenizer, template, max_length=max_length, max_prompt_length=max_prompt_length, long_rows=long_rows,
        train_on=train_on, progress=progress,
    )  # fmt: skip
    kept = [row for block in blocks for row in block]
    encoded = [row for _, row in kept]
    spans = {k: row.spans for k, row in enumerate(encoded) if list(row.spans) != [row.spans[0], len(row.ids)]}
    row_ids = [row_id for row_id, _ in kept]
    dataset = EncodedDataset(row_ids, [row.ids for row in encoded], [row.spans[0] for row in encoded], spans)
    dataset.report = report
    if any(row.teacher_ids is not None for row in encoded):
        dataset.for_teacher = [row.read[0] for row in encoded], [row.read[1] for row in encoded]
    if not may_be_empty:
        refuse_empty(report, name, max_prompt_length, max_length)
    return dataset, report


def encoded_blocks(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_length: int,
    max_prompt_length: int,
    long_rows: str = "drop",
    train_on: TrainOn | None = None,
    progress: str | None = None,
) -> tuple[Iterator[list[KeptRow]], EncodingReport]:
    """The rows that are kept, a block at a time.

    Args:
        rows: as in ``encode_rows``, and so are the others.
        tokenizer: see there.
        template: see there.
        max_length: see there.
        max_prompt_length: see there.
        long_rows: see there.
        train_on: see there.
        progress: see there.

    Returns:
        the blocks, and the report, which counts the rows of the blocks that were taken so far.

    Raises:
        UserError: see ``encode_rows``.
    """
    end = _checked_end(tokenizer, max_length, max_prompt_length, long_rows)
    encoder = RowEncoder(tokenizer, TextCutter(tokenizer, template, train_on), max_length, max_prompt_length, end)
    for_teacher = TeacherRows(encoder)
    report = EncodingReport(rows=len(rows), template=template.name, dated=template.is_chat and is_dated(tokenizer))

    def blocks() -> Iterator[list[KeptRow]]:
        for block in _blocks(rows, progress):
            read, too_long = for_teacher.add(block, encoder.encode(block))
            report.teacher_too_long += too_long
            encoded = zip(block, read, strict=True)
            yield [(row.id, kept) for row, one in encoded if (kept := _counted(row, one, long_rows, report))]

    return blocks(), report


def _counted(row: Row, encoded: EncodedRow | None, long_rows: str, report: EncodingReport) -> EncodedRow | None:
    """``encoded`` where the row is kept; ``report`` learns what became of it."""
    if encoded is None or (long_rows == "drop" and encoded.cut):
        report.dropped += 1
        report.dropped_ids += [row.id] if len(report.dropped_ids) < 5 else []
        return None
    report.kept += 1
    report.cut += encoded.cut
    report.prompts_cut += encoded.prompt_cut
    report.prefixed += bool(row.teacher_prefix)
    if encoded.ignored is not None:
        report.ignored += 1
        report.ignored_example = report.ignored_example or f"{encoded.ignored} of row '{row.id}'"
    learned = sum(encoded.spans[1::2]) - sum(encoded.spans[::2])
    report.response_tokens += learned
    report.prompt_tokens += len(encoded.ids) - learned
    return encoded


def refuse_empty(report: EncodingReport, name: str, max_prompt_length: int, max_length: int) -> None:
    """Raise a ``UserError`` where no row is left.

    Args:
        report: of the rows.
        name: what errors call them.
        max_prompt_length: under which limits.
        max_length: in tokens, both.

    Raises:
        UserError: all rows were dropped.
    """
    if not report.kept:
        raise UserError(
            f"{name}: no row left: all {report.rows} rows are too long for data.max_prompt_length = {max_prompt_length} and "
            f"data.max_length = {max_length} (in tokens). Raise the limits, or use data.long_rows: cut."
        )


def _checked_end(tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int, long_rows: str) -> int:
    """The id of the end-of-sequence token, once limits and tokenizer are known to fit together."""
    if long_rows not in ("drop", "cut"):
        raise UserError(f"data.long_rows: got {long_rows!r}, expected 'drop' or 'cut'")
    if not 0 < max_prompt_length < max_length:
        raise UserError(
            f"data.max_prompt_length: got {max_prompt_length}, expected at least 1 and less than "
            f"data.max_length ({max_length}), or no response fits"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token (eos_token): the student could never learn to stop"
        )
    return int(tokenizer.eos_token_id)


def _blocks(rows: Sequence[Row], progress: str | None, size: int = 1000) -> Iterator[list[Row]]:
    """Yield the rows in blocks (tokenizers work on a block in parallel), moving a progress bar along."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(
        console=Console(stderr=True), transient=True, disable=progress is None or len(rows) <= 2 * size
    ) as bar:
        task = bar.add_task(progress or "", total=len(rows))
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])
            bar.advance(task, size)
