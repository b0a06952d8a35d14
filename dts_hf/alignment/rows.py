"""Rows aligned with a teacher that has another tokenizer: its own template, its own tokens, the same answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from dts_hf.alignment.answers import ReadAnswer, align, read_answer
from dts_hf.alignment.batch import AlignedRow
from dts_hf.alignment.common import CommonVocabulary, common_vocabulary, end_pairs
from dts_hf.alignment.token_bytes import TokenBytes, token_bytes
from dts_hf.data.chat_templates import Template, end_of_turn_ids, resolve_template
from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.row_encoder import RowEncoder
from dts_hf.data.rows import Row
from dts_hf.data.targets import TextCutter, TrainOn
from dts_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How many times as many tokens a row may have in the teacher's tokenizer as ``max_length`` allows in the student's.
ROOM = 2
_BLOCK = 1000  # rows that are tokenised together


@dataclass(frozen=True, eq=False)
class Side:
    """How one model reads rows.

    Attributes:
        tokenizer: its own.
        cutter: says what of a row is learned, in its own template.
        table: bytes of its tokens.
        ends: ids of the tokens that end an answer: that of the template, then ``eos_token``.
    """

    tokenizer: PreTrainedTokenizerBase
    cutter: TextCutter
    table: TokenBytes
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: Template, train_on: TrainOn | None) -> Side:
        """The side of a model with this tokenizer.

        Raises:
            UserError: the bytes of its tokens are not known, or it has no end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise UserError("alignment: a tokenizer has no end-of-sequence token (eos_token), expected one that has")
        ends = (*end_of_turn_ids(tokenizer, template), int(tokenizer.eos_token_id))
        return cls(tokenizer, TextCutter(tokenizer, template, train_on), token_bytes(tokenizer), ends)

    def texts(self, row: Row) -> list[str]:
        """What is learned of ``row``, a text for each turn."""
        return self.cutter.cut(row).texts[1::2]


@dataclass
class AlignmentReport:
    """What became of the rows.

    Attributes:
        rows: how many.
        labels: of the student.
        pairs: those that are the same for the teacher.
        covered: those whose bytes the teacher's labels cover.
        length: bytes that both sides cover.
        unaligned: rows of which nothing is the same, by reason; they are learned from labels alone.
        unaligned_ids: the first five of them.
    """

    rows: int = 0
    labels: int = 0
    pairs: int = 0
    covered: int = 0
    length: int = 0
    unaligned: dict[str, int] = field(default_factory=dict)
    unaligned_ids: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the labels, those that are the same."""
        return self.pairs / max(self.labels, 1)

    def summary(self) -> str:
        """One line for people."""
        text = f"{self.share:.1%} of {self.labels:,} labels are the same for the teacher"
        if self.unaligned:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.unaligned.items())
            ids = ", ".join(self.unaligned_ids) + (", ..." if sum(self.unaligned.values()) > 5 else "")
            text += f"; rows that are learned from labels alone: {reasons} ({ids})"
        return text


class RowAligner:
    """Reads rows as the teacher does and finds what is the same.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
        template: the name of the prompt template, which each resolves for itself: ``auto`` is the own chat template of each
            that has one.
        train_on: which turns are learned.
        max_length: of a row, in the student's tokens; in the teacher's it may have ``ROOM`` times as many.
        max_prompt_length: the same of a prompt.

    Attributes:
        ends: the tokens that end an answer, as (student's, teacher's) ids.
        common: all pairs of ids.

    Raises:
        UserError: the bytes of a tokenizer's tokens are not known.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        template: str,
        *,
        train_on: TrainOn | None,
        max_length: int,
        max_prompt_length: int,
    ) -> None:
        self.student, self.teacher = (
            Side.of(tokenizer, resolve_template(template, tokenizer), train_on) for tokenizer in (student, teacher)
        )
        self.ends = end_pairs(self.student.ends, self.teacher.ends)
        self.common: CommonVocabulary = common_vocabulary(student, teacher, self.ends)
        limits = ROOM * max_length, ROOM * max_prompt_length
        self.encoder = RowEncoder(teacher, self.teacher.cutter, *limits, self.teacher.ends[-1])

    def align(self, dataset: EncodedDataset, rows: Iterable[Row]) -> AlignmentReport:
        """Give each row of ``dataset`` its teacher's side (``dataset.aligned``).

        Args:
            dataset: what the student's tokenizer made of ``rows``.
            rows: their text.

        Raises:
            UserError: the teacher's template cannot hold a row.
        """
        by_id = {row.id: row for row in rows}
        report, aligned = AlignmentReport(), list[AlignedRow]()
        places = iter(range(len(dataset)))
        while block := list(islice(places, _BLOCK)):
            aligned += self._block(dataset, block, [by_id[dataset.row_ids[place]] for place in block], report)
        dataset.aligned = aligned
        return report

    def _block(
        self, dataset: EncodedDataset, places: Sequence[int], rows: Sequence[Row], report: AlignmentReport
    ) -> Iterator[AlignedRow]:
        for place, row, read in zip(places, rows, self.encoder.encode(rows), strict=True):
            labels = sum(stop - start for start, stop in dataset.spans(place))
            found: AlignedRow | str = "the teacher's prompt is too long"
            if read is not None:
                bounds = list(zip(read.spans[::2], read.spans[1::2], strict=True))
                found = self._row(row, (dataset.ids[place], dataset.spans(place)), (read.ids, bounds))
            if isinstance(found, str):
                report.unaligned[found] = report.unaligned.get(found, 0) + 1
                report.unaligned_ids += [row.id] if len(report.unaligned_ids) < 5 else []
                found = AlignedRow.without_pairs(self.teacher.ends[-1], labels)
            report.rows += 1
            report.labels += labels
            report.pairs += len(found.student)
            report.covered += int(found.covered.sum())
            report.length += found.length
            yield found

    def _row(
        self,
        row: Row,
        student: tuple[Sequence[int], Sequence[tuple[int, int]]],
        teacher: tuple[Sequence[int], Sequence[tuple[int, int]]],
    ) -> AlignedRow | str:
        """What is the same of one row, of which each side has tokens and spans of labels; or why nothing is."""
        texts = self.student.texts(row), self.teacher.texts(row)
        if len(texts[0]) != len(texts[1]):
            return "the templates cut the answer otherwise"
        covered, ours, theirs, asked, length = [], [], [], [], 0
        first, first_of_teacher = 0, 0
        for turn, ((start, stop), (t_start, t_stop)) in enumerate(zip(student[1], teacher[1], strict=False)):
            one = _read(self.student, student[0], start, stop, texts[0][turn])
            other = _read(self.teacher, teacher[0], t_start, t_stop, texts[1][turn])
            if one is None or other is None:
                who = "student" if one is None else "teacher"
                return f"the {who}'s tokenizer changes the text or does not know it"
            # Of a text the first token is read and no label: nothing predicts it
            skip, t_skip = len(one.ids) - (stop - start), len(other.ids) - (t_stop - t_start)
            same = align(one, other, self.common)
            opening = _opening(one, other, skip, t_skip) if skip or t_skip else -1
            within = ((one.before >= opening) & (one.ends <= same.covered))[skip:]
            asked_for = (other.before >= opening) & (other.ends <= same.covered)
            asked_for[:t_skip] = False
            labelled = np.flatnonzero(asked_for)
            kept = (same.student >= skip) & asked_for[same.teacher]
            ours.append(same.student[kept] - skip + first)
            theirs.append(np.searchsorted(labelled, same.teacher[kept]) + first_of_teacher)
            covered.append(within)
            asked.append(labelled - t_skip + t_start)
            length += max(same.length - max(opening, 0), 0)
            first, first_of_teacher = first + len(within), first_of_teacher + len(labelled)
        rest = sum(stop - start for start, stop in student[1][len(covered) :])
        covered.append(np.zeros(rest, np.bool_))  # turns that the teacher's limit has cut off
        labels = np.concatenate(asked)
        if not len(labels):
            return "the templates write the answer otherwise"
        ids = np.asarray(teacher[0][: int(labels[-1]) + 1], np.int32)
        student_pairs, teacher_pairs = (np.concatenate(part).astype(np.int32) for part in (ours, theirs))
        return AlignedRow(
            ids, labels.astype(np.int32), np.concatenate(covered), student_pairs, teacher_pairs, length
        )  # fmt: skip


def _opening(student: ReadAnswer, teacher: ReadAnswer, skip: int, teacher_skip: int) -> int:
    """The first byte at which a label of both sides begins, where the first tokens are no labels."""
    shared = np.intersect1d(student.before[skip:], teacher.before[teacher_skip:])
    return int(shared[0]) if len(shared) else int(np.iinfo(np.int64).max)


def _read(side: Side, ids: Sequence[int], start: int, stop: int, text: str) -> ReadAnswer | None:
    """The answer at ``ids[start:stop]``; of a row that is all answer its first token belongs to it, too."""
    found = read_answer(side.table, ids[start:stop], text, side.ends)
    if found is None and start == 1:
        found = read_answer(side.table, ids[:stop], text, side.ends)
    return found
