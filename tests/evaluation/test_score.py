"""Scores of a file of predictions, and its error messages."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dts_hf.errors import UserError
from dts_hf.evaluation.metrics import ExactMatch, RougeL
from dts_hf.evaluation.score import score_file

ROWS = [
    {"prediction": "Rain falls.", "references": ["rain fell", "Rain falls"], "id": 1},
    {"prediction": "", "reference": "Something"},
    {"prediction": "a b c d e a b c d", "output": ["x"]},
    {"prediction": "two words", "output": "two other words"},
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_command_prints_the_scores_as_the_literature_logs_them(tmp_path: Path) -> None:
    """ROUGE-L and exact match x 100 with four decimals, from a file that anyone may have written."""
    from rouge_score.rouge_scorer import RougeScorer
    from typer.testing import CliRunner

    from dts_hf.cli.app import app

    file = write(tmp_path / "p.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    shown = CliRunner().invoke(app, ["score", str(file)]).stdout
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [
        ("Rain falls.", "Rain falls"),
        ("", "Something"),
        ("a b c d e a b c d", "x"),
        ("two words", "two other words"),
    ]
    mean = sum(scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs) / 4
    assert f"{100 * mean:.4f}" in shown and "25.0000" in shown and "x 100" in shown


def test_scores_of_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    scores = score_file(file)
    predictions = [row["prediction"] for row in ROWS]
    references = [["rain fell", "Rain falls"], ["Something"], ["x"], ["two other words"]]
    metric = RougeL(keep_in_memory=True).compute(predictions=predictions, references=references)
    exact = ExactMatch(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert scores == {"n": 4, **metric, **exact, "empty": 0.25, "repeats_4gram": 0.25}
    assert scores["rougeL"] == pytest.approx((1 + 0 + 0 + 0.8) / 4)
    assert scores["exact_match"] == 0.25


def test_sets_stand_alone_and_seeds_are_averaged(tmp_path: Path) -> None:
    """As in predictions/student.jsonl of a run: a set of many rows does not outweigh a small one."""

    def row(set_name: str, seed: int, prediction: str) -> str:
        return json.dumps({"set": set_name, "seed": seed, "prediction": prediction, "reference": "yes"})

    rows = [row("a", 1, "yes"), row("a", 1, "no"), row("a", 2, "yes"), row("a", 2, "yes"), row("b", 1, "no")]
    scores = score_file(write(tmp_path / "p.jsonl", "\n".join(rows)))
    assert list(scores) == ["sets"] and list(scores["sets"]) == ["a", "b"]
    assert scores["sets"]["a"] == {
        "n": 2, "seeds": 2, "rougeL": 0.75, "exact_match": 0.75, "empty": 0.0, "repeats_4gram": 0.0
    }  # fmt: skip
    assert scores["sets"]["b"]["n"] == 1 and scores["sets"]["b"]["exact_match"] == 0.0
    assert score_file(write(tmp_path / "a.jsonl", "\n".join(rows[:4]))) == scores["sets"]["a"]
    # A pass that a kill cut short counts as one pass all the same
    uneven = score_file(write(tmp_path / "u.jsonl", "\n".join([*rows[:3], row("a", 3, "yes")])))
    assert (uneven["n"], uneven["seeds"], uneven["exact_match"]) == (2, 3, pytest.approx(2.5 / 3))


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path: Path) -> None:
    row = json.dumps({"prediction": "one\u2028two\u0085three", "reference": "one two three"}, ensure_ascii=False)
    assert score_file(write(tmp_path / "p.jsonl", "\ufeff" + row))["rougeL"] == 1.0


GOOD = '{"prediction": "a", "reference": "b"}\n'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (GOOD + '{"prediction": "a", ', ["line 2", "broken JSON"]),
        (GOOD + "\n[1]", ["line 3", "[1]", "expected an object"]),
        ('{"predictions": "a", "reference": "b"}', ["line 1", "'prediction'", "Did you mean 'predictions'?"]),
        ('{"prediction": null, "reference": "b"}', ["line 1", "prediction", "null", "expected a text"]),
        ('{"prediction": "a", "refrences": ["b"]}', ["line 1", "'references'", "Did you mean 'refrences'?"]),
        ('{"prediction": "a", "references": []}', ["line 1", "references", "[]", "at least one"]),
        ('{"prediction": "a", "references": ["b", 3]}', ["line 1", "references", "3"]),
        ("\n \n", ["no rows"]),
        ("", ["no rows"]),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = write(tmp_path / "bad.jsonl", text)
    with pytest.raises(UserError) as error:
        score_file(file)
    for part in [str(file), *parts]:
        assert part in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "answers.jsonl", GOOD)
    with pytest.raises(UserError, match=r"no such file.*Did you mean 'answers.jsonl'"):
        score_file(tmp_path / "answer.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        score_file(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + '{"prediction": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        score_file(tmp_path / "latin.jsonl")
    if os.geteuid() != 0:
        (tmp_path / "answers.jsonl").chmod(0)
        with pytest.raises(UserError, match="cannot be read"):
            score_file(tmp_path / "answers.jsonl")


def test_a_row_without_a_reference_text_is_left_out(tmp_path: Path) -> None:
    """A bare tool call has none, and an empty answer is not right."""
    silent = '{"prediction": "", "references": [""]}'
    scores = score_file(write(tmp_path / "a.jsonl", f'{silent}\n{{"prediction": "b", "references": ["a"]}}\n'))
    assert (scores["n"], scores["exact_match"], scores["rougeL"], scores["empty"]) == (2, 0.0, 0.0, 0.5)
    with pytest.raises(UserError, match="none of the 1 rows has a reference with a text"):
        score_file(write(tmp_path / "b.jsonl", silent))
