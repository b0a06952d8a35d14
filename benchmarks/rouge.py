"""ROUGE-L: time and equality against ``rouge_score``: ``python benchmarks/rouge.py [PAIRS] [--quick] [--rows FILE]``.

Made-up answers, or the references of a row file paired with each other (``--rows``, JSONL with ``output``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path

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
PARTS = 5  # the two take turns, so that a busy machine disturbs both


def make_pairs(count: int) -> list[tuple[str, str]]:
    generator = random.Random(0)
    generator.shuffle(VOCABULARY)

    def text(words: int) -> str:
        return " ".join(generator.choices(VOCABULARY, WEIGHTS, k=words))

    return [(text(PREDICTION_WORDS), text(REFERENCE_WORDS)) for _ in range(count)]


def pairs_of_rows(path: Path, count: int) -> list[tuple[str, str]]:
    outputs = [json.loads(line)["output"] for line in path.open(encoding="utf-8")]
    texts = [text for output in outputs for text in ([output] if isinstance(output, str) else output)]
    generator = random.Random(0)
    return [(generator.choice(texts), generator.choice(texts)) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="?", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="200 pairs: does it run?")
    parser.add_argument("--rows", type=Path, help="JSONL file of rows with output")
    options = parser.parse_args()
    count = 200 if options.quick else options.pairs
    pairs = make_pairs(count) if options.rows is None else pairs_of_rows(options.rows, count)
    words = [sum(len(text.split()) for text in column) / count for column in zip(*pairs, strict=True)]
    print(f"{count} pairs of {words[0]:.0f} and {words[1]:.0f} words on average, in {PARTS} parts that take turns")
    for use_stemmer in (True, False):
        scorer = RougeScorer(["rougeL"], use_stemmer=use_stemmer)
        slow = cold = warm = error = 0.0
        _stem.cache_clear()
        for part in range(PARTS):
            some = pairs[part::PARTS]
            start = time.perf_counter()
            theirs = [scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in some]
            slow += time.perf_counter() - start
            for first in (True, False):
                start = time.perf_counter()
                ours = [rouge_l(prediction, reference, use_stemmer) for prediction, reference in some]
                cold, warm = (
                    (cold + time.perf_counter() - start, warm) if first else (cold, warm + time.perf_counter() - start)
                )
            error = max(error, *(abs(a - b) for a, b in zip(theirs, ours, strict=True)))
        print(
            f"stemmer {'on' if use_stemmer else 'off'}: rouge_score {slow:.2f} s, ours {cold:.3f} s "
            f"({slow / cold:.1f} x faster), with the stems of an earlier pass {warm:.3f} s ({slow / warm:.1f} x), "
            f"largest difference {error}"
        )


if __name__ == "__main__":
    main()
