"""Text measures that need no reference implementation: normalised equality, emptiness, repetition."""

from __future__ import annotations

import string
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower-case ``text``, remove ASCII punctuation and squeeze white space; articles stay."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether ``prediction`` equals one of ``references`` once case, punctuation and spaces are set aside."""
    answer = normalize(prediction)
    return any(answer == normalize(reference) for reference in references)


def repeats_ngram(text: str, n: int = 4) -> bool:
    """Whether ``n`` lower-cased words in a row occur twice in ``text``: the mark of a model that runs in circles."""
    words = text.lower().split()
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(ngrams)) < len(ngrams)
