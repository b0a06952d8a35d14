"""Measures of one answer: ROUGE-L, equality, repetition. ``metrics.py`` has them as ``evaluate.Metric`` classes."""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Iterable, Sequence

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _StemOnceTokenizer(Tokenizer):
    """The tokenizer of ``rouge_score`` with a memory: a word is stemmed once and not wherever it occurs.

    Stemming is two thirds of the time of ``rouge_score``; with the memory 10,000 answers take 4 to 8 seconds, little
    beside the time it takes to generate them. Hence no pool of processes, which would start the caller's script again
    in each of them and compete with the other ranks for the cores.
    """

    def __init__(self) -> None:
        self._words: Callable[[str], list[str]] = DefaultTokenizer(use_stemmer=False).tokenize
        self._stem: Callable[[str], list[str]] = functools.lru_cache(maxsize=1 << 17)(
            DefaultTokenizer(use_stemmer=True).tokenize
        )

    def tokenize(self, text: str) -> list[str]:
        # Of a single word `rouge_score` makes a list of its stem, or an empty one
        return [stem for word in self._words(text) for stem in self._stem(word)]


@functools.cache
def _scorer(use_stemmer: bool) -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=_StemOnceTokenizer() if use_stemmer else DefaultTokenizer())


def without_thoughts(text: str) -> str:
    """What is said in ``text``: nothing between ``<think>`` and ``</think>``, which chat templates write round thoughts.

    Qwen3's template puts an empty pair before every answer. A prompt may have opened it already (DeepSeek-R1), and an
    answer that was cut may never close it.
    """
    if "think>" not in text:
        return text
    said = re.sub("<think>.*?</think>", "", text, flags=re.DOTALL).rpartition("</think>")[2]
    return said.partition("<think>")[0].strip()


def has_reference(references: Sequence[str]) -> bool:
    """Whether there is a text that an answer can be compared with: an empty one would make silence right."""
    return any(without_thoughts(reference).strip() for reference in references)


def best_rouge_l(prediction: str, references: Sequence[str], use_stemmer: bool = True) -> float:
    """Return the F-measure of ROUGE-L (Lin 2004) against the best reference, as ``rouge_score`` computes it.

    Thoughts (``without_thoughts``) count on neither side.

    Args:
        prediction: generated text.
        references: the texts it is compared with, at least one.
        use_stemmer: compare Porter stems of words longer than three letters. Without it, published scores are about
            0.8 points lower.

    Returns:
        Between 0 and 1; 0 where a text has no word of ASCII letters or digits: other scripts have none.
    """
    said = [without_thoughts(reference) for reference in references]
    return float(_scorer(use_stemmer).score_multi(said, without_thoughts(prediction))["rougeL"].fmeasure)


def normalize(text: str) -> str:
    """Lower-case ``text``, remove ASCII punctuation and squeeze white space; articles stay."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether ``prediction`` equals one of ``references`` once thoughts, case, punctuation and spaces are set aside."""
    answer = normalize(without_thoughts(prediction))
    return any(answer == normalize(without_thoughts(reference)) for reference in references)


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All runs of ``n`` lower-cased words between white space, in order; none where there are fewer words."""
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Distinct-n: different n-grams of all ``texts`` together over their number; None where they have none.

    After Li et al. 2016 (arXiv 1510.03055, section 5), who divide by the number of words instead, which differs little. The
    more text, the smaller: compare texts that answer the same prompts, and look at their length too.

    Args:
        texts: a corpus of answers, or a single one. No n-gram runs across two of them.
        n: 1 for words, 2 for pairs of words.
    """
    found = [ngram for text in texts for ngram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else None


def repeats_ngram(text: str, n: int = 4) -> bool:
    """Whether ``n`` lower-cased words in a row occur twice in ``text``: the mark of a model that runs in circles."""
    found = ngrams(text, n)
    return len(set(found)) < len(found)
