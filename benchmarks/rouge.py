"""ROUGE-L: time and equality against ``rouge_score`` on made-up answers: ``python benchmarks/rouge.py [PAIRS]``."""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time

from rouge_score.rouge_scorer import RougeScorer

from dts_hf.evaluation.rouge import _stem, rouge_l

STEMS = [
    "train",
    "rain",
    "house",
    "light",
    "word",
    "river",
    "ocean",
    "market",
    "danger",
    "letter",
    "paint",
    "relat",
    "organ",
]
ENDINGS = ["", "s", "ing", "ed", "er", "ers", "ly", "ness", "ation", "ational", "fulness", "ize"]
# Some thousand words, of frequencies as in a language (Zipf): a stem is looked up often, but not always
VOCABULARY = ["".join(parts) for parts in itertools.product(STEMS, STEMS, ENDINGS)]
WEIGHTS = [1 / rank for rank in range(1, len(VOCABULARY) + 1)]
PREDICTION_WORDS, REFERENCE_WORDS = 42, 56  # the means of the usual instruction sets
REPEATS = 3


def make_pairs(count: int) -> list[tuple[str, str]]:
    generator = random.Random(0)
    generator.shuffle(VOCABULARY)

    def text(words: int) -> str:
        return " ".join(generator.choices(VOCABULARY, WEIGHTS, k=words))

    return [(text(PREDICTION_WORDS), text(REFERENCE_WORDS)) for _ in range(count)]


def main(count: int) -> None:
    pairs = make_pairs(count)
    print(f"{count} pairs of {PREDICTION_WORDS} and {REFERENCE_WORDS} words, medians of {REPEATS} interleaved runs")
    for use_stemmer in (True, False):
        scorer = RougeScorer(["rougeL"], use_stemmer=use_stemmer)
        times: list[tuple[float, float]] = []
        for _ in range(REPEATS):
            _stem.cache_clear()
            start = time.perf_counter()
            theirs = [scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
            middle = time.perf_counter()
            ours = [rouge_l(prediction, reference, use_stemmer) for prediction, reference in pairs]
            times.append((middle - start, time.perf_counter() - middle))
        slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
        error = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        print(
            f"stemmer {'on' if use_stemmer else 'off'}: rouge_score {slow:.2f} s, ours {fast:.3f} s, "
            f"{slow / fast:.1f} x faster, largest difference {error}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
