"""ROUGE-L with remembered stems against plain ``rouge_score``; the other text measures by hand."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from dts_hf.evaluation.text_metrics import best_rouge_l, distinct, exact_match, normalize, repeats_ngram

NASTY = [
    "",
    " \n\t ",
    "...!?",
    "a",
    "The cat sat on the mat.",
    "the CAT, sat; on-the mats",
    "running runs runner ran generalizations generalization relational",
    "Café crème brûlée naïve coöperate",
    "ﬁnal ﬂight of the ﬃ ligature",
    "İstanbul ISPARTA \u0131ss\u0131z I i",
    "東京は日本の首都です",
    "東京 Tokyo 2021 東京",
    "Straße ẞ GROSS",
    "x" * 3000,
    "y" * 3000,
    ("abcdefghij" * 300) + "ing",
    "don't it's o'clock U.S.A. e-mail 3.14 1,000",
    "one two " * 200,
    "under_score snake_case __init__",
    "emoji 🎉 and\u200bzero width\u00a0space",
    "I\u0307 K\u212a \u017f long s",
]


def oracle(prediction: str, reference: str, use_stemmer: bool) -> float:
    return RougeScorer(["rougeL"], use_stemmer=use_stemmer).score(reference, prediction)["rougeL"].fmeasure


@pytest.mark.parametrize("use_stemmer", [True, False])
def test_nasty_texts_score_exactly_as_in_rouge_score(use_stemmer: bool) -> None:
    for prediction, reference in itertools.product(NASTY, NASTY):
        assert best_rouge_l(prediction, [reference], use_stemmer) == oracle(prediction, reference, use_stemmer)


@pytest.mark.parametrize("use_stemmer", [True, False])
def test_random_texts_score_exactly_as_in_rouge_score(use_stemmer: bool) -> None:
    generator = random.Random(0)
    words = [
        "rain",
        "rains",
        "raining",
        "the",
        "a",
        "of",
        "trains",
        "trained",
        "it's",
        "happily",
        "happiness",
        "Ärger",
        "9",
        "x1",
    ]
    for _ in range(400):
        first, second = (
            " ".join(generator.choices(words, k=generator.randrange(0, 40)))
            + generator.choice(["", ".", "\n", " \u3000"])
            for _ in range(2)
        )
        assert best_rouge_l(first, [second], use_stemmer) == oracle(first, second, use_stemmer)


@pytest.mark.shared_data
def test_real_answers_score_exactly_as_in_rouge_score(shared_data_dir: Path) -> None:
    rows = [json.loads(line) for line in (shared_data_dir / "dolly" / "valid.jsonl").open(encoding="utf-8")]
    texts = [row["output"] for row in rows]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for prediction, reference in itertools.pairwise(texts):
        assert best_rouge_l(prediction, [reference]) == scorer.score(reference, prediction)["rougeL"].fmeasure


@pytest.mark.slow
@pytest.mark.shared_data
def test_thousands_of_real_pairs_score_exactly_as_in_rouge_score(shared_data_dir: Path) -> None:
    """Answers of all the sets, each against itself shortened or against another one of its set."""
    names = (
        "dolly/test",
        "dolly/valid",
        "self_inst/test",
        "vicuna/test",
        "s_ni/test_11plus",
        "uinst/test_11plus_head",
    )
    generator, texts = random.Random(0), {}
    for name in names:
        rows = [json.loads(line) for line in (shared_data_dir / f"{name}.jsonl").open(encoding="utf-8")]
        outputs = [row["output"] for row in rows]
        texts[name] = [text for output in outputs for text in ([output] if isinstance(output, str) else output)]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = []
    for _ in range(3_000):
        some = texts[generator.choice(names)]
        reference = generator.choice(some)
        words = reference.split()
        own = " ".join(words[generator.randrange(len(words) + 1) // 2 :])
        # The oracle fills a table of all pairs of words: keep its time within reason
        prediction, reference = (
            text[:600] for text in (own if generator.random() < 0.5 else generator.choice(some), reference)
        )
        scores.append(best_rouge_l(prediction, [reference]))
        assert scores[-1] == scorer.score(reference, prediction)["rougeL"].fmeasure, (prediction, reference)
    assert len(set(scores)) > 500


def test_the_stemmer_is_on_by_default_and_matters() -> None:
    assert best_rouge_l("It rained", ["it rains"]) == 1.0
    assert best_rouge_l("It rained", ["it rains"], use_stemmer=False) == 0.5


def test_the_best_reference_counts() -> None:
    assert best_rouge_l("two apples", ["no match here", "two apples", ""]) == 1.0
    assert best_rouge_l("two apples", ["", "one apple", "none"]) == 0.5
    assert isinstance(best_rouge_l("", ["no word"]), float), "a score is a number with a point in every JSON file"


def test_the_metrics_are_evaluate_metrics_that_work_without_network() -> None:
    from dts_hf.evaluation.metrics import ExactMatch, RougeL

    predictions = ["The boats sailed.", "nothing"]
    references = [["the boat sails", "The boats sailed"], ["something else"]]
    rouge = RougeL(keep_in_memory=True)
    rouge.add_batch(predictions=predictions[:1], references=references[:1])
    rouge.add_batch(predictions=predictions[1:], references=references[1:])
    result = rouge.compute(per_example=True)
    assert result == {"rougeL": 0.5, "rougeL_scores": [1.0, 0.0]}
    assert ExactMatch(keep_in_memory=True).compute(predictions=predictions, references=references) == {
        "exact_match": 0.5
    }


def test_exact_match_sets_case_punctuation_and_spaces_aside_but_not_articles() -> None:
    assert normalize("  The  Answer,\n is: 42! ") == "the answer is 42"
    assert exact_match("the answer", ["An answer", "THE answer."])
    assert not exact_match("the answer", ["answer"])


def test_a_repeated_4gram_is_found() -> None:
    assert repeats_ngram("we like to sing and we LIKE to sing")
    assert not repeats_ngram("we like to sing and you like to sing")  # three words only
    assert repeats_ngram("no no no no no")  # overlapping
    assert not repeats_ngram("no no no no")
    assert not repeats_ngram("")


def test_distinct_n_is_of_the_corpus_or_of_one_answer() -> None:
    """3 of 5 words and 2 of 3 pairs are different; no pair runs across two answers; case does not count."""
    corpus = ["The cat sat", "the Cat"]
    assert distinct(corpus, 1) == 3 / 5 and distinct(corpus, 2) == 2 / 3
    assert distinct(["a b", "b a"], 2) == 1.0 and distinct(["a a a a"], 1) == 1 / 4
    assert distinct(["", "one"], 2) is None and distinct([""], 1) is None and distinct([], 1) is None
