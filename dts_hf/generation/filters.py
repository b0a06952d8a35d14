"""Which answers are worth learning: those that say something, come to an end, and do not go round in circles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

#: Why an answer is left out.
Fault: TypeAlias = Literal["empty", "cut", "repeating"]
Cut: TypeAlias = Literal["drop", "keep"]
NGRAM = 4
#: Above it an answer repeats itself; docs/sequence_level.md says what has so much.
MAX_REPETITION = 0.5
#: Shorter answers are not looked at: "no, no, no" may be right.
LEAST_TOKENS = 16


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """The share of n-grams of an answer that it has said before: 1 - distinct / all, from 0 to below 1.

    ``seq-rep-n`` of Welleck et al. 2020 (arXiv 1908.04319), section 6.1. An answer without an n-gram has 0.

    Args:
        tokens: ids of the answer.
        n: length of the n-grams, in tokens.
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def fault(text: str, tokens: Sequence[int], finished: bool, cut: Cut, max_repetition: float) -> Fault | None:
    """Why an answer is not learned; None: it is.

    Args:
        text: of the answer, without spaces around it.
        tokens: its ids, without the one that ended it.
        finished: it reached an end of turn.
        cut: what becomes of those that did not.
        max_repetition: the largest ``repetition``; 1 leaves all in.
    """
    if not text:
        return "empty"
    if not finished and cut == "drop":
        return "cut"
    if len(tokens) >= LEAST_TOKENS and repetition(tokens) > max_repetition:
        return "repeating"
    return None
