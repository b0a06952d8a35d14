"""The ids of two tokenizers that mean the same: equal bytes, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dts_hf.alignment.token_bytes import TokenBytes, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class CommonVocabulary:
    """K pairs of ids, one of each tokenizer; no id is in two of them.

    Attributes:
        student: the student's id of each pair, rising, int64 ``[K]``.
        teacher: the teacher's id of the same pair, ``[K]``.
        student_place: the pair of each id of the student, -1 where it has none, int64 ``[V_s]``.
        teacher_place: the same of the teacher's, ``[V_t]``.
    """

    student: NDArray[np.int64]
    teacher: NDArray[np.int64]
    student_place: NDArray[np.int64]
    teacher_place: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.student)


def common_vocabulary(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    ends: Iterable[tuple[int, int]] = (),
) -> CommonVocabulary:
    """The pairs of ids that mean the same.

    1. The tokens that end an answer, as ``ends`` pairs them.
    2. Entries that are spelt alike in two tokenizers of the same scheme, and special tokens that are spelt alike.
    3. Of what is left the ids of equal bytes. Where several ids of one tokenizer have the same bytes, the one that is
       commonly written counts (``TokenBytes.rare``); if there are still several, none.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
        ends: (student's id, teacher's id) of tokens that end an answer.

    Raises:
        UserError: the bytes of a tokenizer's tokens are not known.
    """
    ours, theirs = token_bytes(student), token_bytes(teacher)
    pairs: dict[int, int] = {}
    taken: set[int] = set()

    def add(one: int, other: int) -> None:
        if one not in pairs and other not in taken:
            pairs[one] = other
            taken.add(other)

    for one, other in ends:
        add(one, other)
    spelt = {token: index for index, token in enumerate(theirs.tokens) if token is not None}
    for one, token in enumerate(ours.tokens):
        other = spelt.get(token, -1) if token is not None else -1
        if other < 0 or ours.plain[one] != theirs.plain[other] or ours.contents[one] != theirs.contents[other]:
            continue
        if ours.scheme == theirs.scheme or not ours.plain[one]:
            add(one, other)
    known = _by_bytes(theirs, taken)
    for content, one in _by_bytes(ours, pairs).items():
        if content in known:
            add(one, known[content])
    found = np.array(sorted(pairs.items()), np.int64).reshape(-1, 2)
    places = [_places(found[:, side], len(table.contents)) for side, table in enumerate((ours, theirs))]
    return CommonVocabulary(found[:, 0].copy(), found[:, 1].copy(), *places)


def end_pairs(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    """The tokens that end an answer, paired.

    Args:
        student: the end of turn of the student's template, then its ``eos_token``; the two may be one.
        teacher: the same of the teacher.
    """
    turn, sequence = (student[0], teacher[0]), (student[-1], teacher[-1])
    apart = turn[0] != sequence[0] and turn[1] != sequence[1]
    return [turn, sequence] if apart else [turn]


def _by_bytes(table: TokenBytes, taken: Iterable[int]) -> dict[bytes, int]:
    """The one id of each sequence of bytes, among those that are not ``taken``."""
    gone, doubled = set(taken), set[bytes]()
    found: dict[bytes, int] = {}
    for rare in (False, True):  # the ids that are commonly written come first
        level: dict[bytes, int] = {}
        for index in np.flatnonzero(table.plain & (table.rare == rare)).tolist():
            content = table.contents[index]
            if content in level:
                doubled.add(content)
            level[content] = index
        found |= {
            content: index for content, index in level.items() if content not in found and content not in doubled
        }
    return {content: index for content, index in found.items() if index not in gone}


def _places(ids: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    places = np.full(size, -1, np.int64)
    places[ids] = np.arange(len(ids))
    return places
