"""Which tokens of two tokenisations of one answer are the same, by its bytes.

A pair of tokens is the same where the answer's bytes before both are equal and both stand for the same next bytes; then
the two models have been asked the same question there. Everything is in bytes of the answer: prompts differ, for each
model reads its own template, and so do the tokens that end a turn, which are paired where both sides have said everything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dts_hf.alignment.common import CommonVocabulary
from dts_hf.alignment.token_bytes import TokenBytes


@dataclass(frozen=True, eq=False)
class ReadAnswer:
    """One answer as one tokenizer reads it.

    Attributes:
        text: its bytes, without what ends the turn.
        ids: its n tokens, the one that ends the turn included, int64 ``[n]``.
        starts, ends: the bytes of each token (``token_bytes.Extents``), ``[n]``; the end of the turn stands behind the
            last byte and is counted as one more.
        before: how many bytes are said before each token, ``[n]``.
        has_end: the last token ends the turn.
    """

    text: bytes
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    before: NDArray[np.int64]
    has_end: bool


def read_answer(table: TokenBytes, ids: Sequence[int], text: str, turn_ends: Collection[int]) -> ReadAnswer | None:
    """Where each token of an answer stands.

    Args:
        table: of the tokenizer.
        ids: the answer's tokens, with the one that ends the turn unless they were cut.
        text: what was tokenised; the end of turn may be spelt behind it.
        turn_ends: ids of tokens that end an answer.

    Returns:
        None where the tokens' bytes are not those of the text.
    """
    data, said = text.encode("utf-8", "surrogatepass"), list(ids)
    has_end = bool(said) and said[-1] in turn_ends
    spelling = table.contents[said.pop()] if has_end else b""
    extents = table.extents(said, data)
    if extents is None:
        return None
    starts, ends = extents
    if has_end:
        rest = data[max(int(ends[-1]), 0) if len(ends) else 0 :]
        if rest.endswith(spelling):  # the template has written it
            rest, data = rest[: len(rest) - len(spelling)], data[: len(data) - len(spelling)]
        if rest and not (table.loses_spaces and rest.decode("utf-8", "replace").isspace()):
            return None
        starts, ends = np.append(starts, len(data)), np.append(ends, len(data) + 1)
    before = np.empty_like(ends)
    before[:1], before[1:] = np.minimum(starts[:1], 0), ends[:-1]
    return ReadAnswer(data, np.array(ids, np.int64), starts, ends, before, has_end)


class Alignment(NamedTuple):
    """What two tokenisations of one answer share.

    Attributes:
        student, teacher: the M tokens that are the same, by their numbers among the tokens of each side, ``[M]`` int64.
        covered: bytes up to the last place where a token of both sides ends: each side's tokens that end there or before
            have said the same; the end of the turn counts as one more byte.
        length: bytes of text among them.
    """

    student: NDArray[np.int64]
    teacher: NDArray[np.int64]
    covered: int
    length: int


def align(student: ReadAnswer, teacher: ReadAnswer, common: CommonVocabulary) -> Alignment:
    """The tokens that are the same on both sides; the sides may end at different places.

    Args:
        student: the answer as the student's tokenizer reads it.
        teacher: the same of the teacher's; its text may differ behind some byte, where templates do.
        common: pairs of ids; tokens whose ids are no pair are not the same, whatever their bytes.
    """
    same = _same_bytes(student.text, teacher.text)
    whole = same == len(student.text) == len(teacher.text)
    # The end of a turn is one more byte, which texts that differ do not share
    limit = same + 1 if whole else same
    # A place is in both where the bytes before it and behind it are; numbers rise, so halving finds them
    i, j = _shared(student.before * (1 << 32) + student.ends, teacher.before * (1 << 32) + teacher.ends)
    ours, theirs = common.student_place[student.ids[i]], common.teacher_place[teacher.ids[j]]
    kept = (ours == theirs) & (ours >= 0) & (student.starts[i] == teacher.starts[j]) & (student.ends[i] <= limit)
    covered = student.ends[_shared(student.ends, teacher.ends)[0]]
    last = int(covered[covered <= limit].max(initial=0))
    return Alignment(i[kept], j[kept], last, min(last, same))


def _shared(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where two rising sequences have the same numbers: their places in both."""
    if not len(theirs):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    places = np.minimum(theirs.searchsorted(ours), len(theirs) - 1)
    found = (theirs[places] == ours).nonzero()[0]
    return found, places[found]


def _same_bytes(one: bytes, other: bytes) -> int:
    if one == other:
        return len(one)
    shorter = min(len(one), len(other))
    ours, theirs = (np.frombuffer(text, np.uint8, shorter) for text in (one, other))
    different = np.flatnonzero(ours != theirs)
    return int(different[0]) if len(different) else shorter
