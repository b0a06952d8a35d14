"""ROUGE-L, equal to the package ``rouge_score`` to the last bit and about twenty times faster.

``rouge_score`` stems every word of every text again and fills a table of word pairs. Here a stem is computed once per
word, and the longest common subsequence is found with one big integer per text, a bit for each word (Hyyrö 2004,
"Bit-parallel LCS-length computation revisited"). ROUGE-L itself: Lin 2004.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from nltk.stem.porter import PorterStemmer

# ASCII only, as in `rouge_score`: an accented letter separates words, and text in other scripts has no word at all
_WORD = re.compile(r"[a-z0-9]+")
_STEMMER = PorterStemmer()


@functools.lru_cache(maxsize=1 << 17)
def _stem(word: str) -> str:
    return str(_STEMMER.stem(word)) if len(word) > 3 else word


def _words(text: str, use_stemmer: bool) -> list[str]:
    words = _WORD.findall(text.lower())
    return [_stem(word) for word in words] if use_stemmer else words


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two word lists."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | (1 << place)
    everything = (1 << len(first)) - 1
    free = everything  # bit i is 0 once the subsequence uses word i
    for word in second:
        hits = free & places.get(word, 0)
        if hits:
            free = ((free + hits) | (free - hits)) & everything
    return len(first) - free.bit_count()


def rouge_l(prediction: str, reference: str, use_stemmer: bool = True) -> float:
    """Return the F-measure of ROUGE-L.

    Args:
        prediction: generated text.
        reference: the text it is compared with.
        use_stemmer: compare Porter stems of words longer than three letters. Without it, published scores are about
            0.8 points lower.

    Returns:
        Between 0 and 1; 0 when either text has no word of ASCII letters or digits.
    """
    predicted, expected = _words(prediction, use_stemmer), _words(reference, use_stemmer)
    if not predicted or not expected:
        return 0.0
    length = lcs_length(expected, predicted)
    precision, recall = length / len(predicted), length / len(expected)
    # The order of the operations is that of `rouge_score`: another one differs in the last bit
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def best_rouge_l(prediction: str, references: Sequence[str], use_stemmer: bool = True) -> float:
    """Return the largest ``rouge_l`` over ``references``, of which there is at least one."""
    return max(rouge_l(prediction, reference, use_stemmer) for reference in references)
