"""Planted runs beside each other: kinds, means, verdicts, failed runs, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dts_hf.cli.app import app
from dts_hf.errors import UserError
from dts_hf.experiments.compare import Table, compare, of_tasks, task_numbers
from dts_hf.experiments.families import dunnett
from dts_hf.experiments.runs import names_of_kinds, read_run
from dts_hf.experiments.tables import as_csv, markdown
from tests.support.planted_runs import ROWS, plant, plant_classifier


@pytest.fixture
def study(tmp_path: Path) -> list[Path]:
    """T = 1 (the baseline), T = 2 (2 points better) and T = 4 (as good), three seeds each."""
    return [
        plant(tmp_path / f"t{value}-s{seed}", float(value), seed, effect, kl=kl)
        for value, effect, kl in ((1, 0.0, 0.6), (2, 2.0, 0.7), (4, 0.0, 0.6))
        for seed in (1, 2, 3)
    ]


def table_of(tables: list[Table], measure: str) -> Table:
    (found,) = [table for table in tables if table.measure == measure]
    return found


def test_kinds_means_and_verdicts(study) -> None:
    tables = compare(study)
    rouge = table_of(tables, "rougeL")
    assert rouge.baseline == "temperature.value=1.0" and (rouge.rows, rouge.generations) == (ROWS, 2)
    lines = {line.kind: line for line in rouge.lines}
    better, equal = lines["temperature.value=2.0"], lines["temperature.value=4.0"]
    assert better.verdict is not None and better.verdict.word == "better" and better.near_best and better.wins == 3
    assert better.difference == pytest.approx(2, abs=0.5) and better.p is not None and better.p < 0.01
    assert equal.verdict is not None and equal.verdict.word in ("equivalent", "undecided") and not equal.near_best
    assert [line.kind for line in rouge.lines][:2] == ["temperature.value=1.0", "temperature.value=2.0"]
    by_hand = [np.mean([row["rougeL"] * 100 for row in rows_of(path)]) for path in study if path.name.startswith("t2")]
    assert better.mean == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert better.run_sd == pytest.approx(np.std(by_hand, ddof=1), abs=1e-9)
    kl = table_of(tables, "kl")
    worse = next(line for line in kl.lines if line.kind == "temperature.value=2.0")
    assert worse.verdict is not None and worse.verdict.word == "worse" and kl.rows == 0  # less is better


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions/student.jsonl").read_text().splitlines()]


def test_what_has_no_effect_makes_no_kind(tmp_path: Path) -> None:
    first = plant(tmp_path / "a", 1.0, 1)
    other = plant(tmp_path / "b", 1.0, 2, logging_steps=7, report_to="none", save_steps=3)
    third = plant(tmp_path / "c", 1.0, 3, learning_rate=1e-5)
    assert read_run(first).settings == read_run(other).settings != read_run(third).settings
    with pytest.raises(UserError, match="at least two kinds"):
        compare([first, other])


def test_failed_runs_stay_visible(study) -> None:
    (study[3] / "metrics.json").unlink()
    rouge = table_of(compare(study), "rougeL")
    line = next(line for line in rouge.lines if line.kind == "temperature.value=2.0")
    assert (line.seeds, line.failed) == (2, 1)
    assert any("1 of 3 runs have no scores" in note for note in rouge.notes)
    assert any("not paired by seed" in note for note in rouge.notes)
    assert "2 (+1 failed)" in markdown([rouge])


def test_a_run_that_diverged_is_a_failed_one(study) -> None:
    metrics = json.loads((study[3] / "metrics.json").read_text())
    metrics["models"]["student"]["teacher_forced"]["kl"] = math.nan
    (study[3] / "metrics.json").write_text(json.dumps(metrics))
    assert "kl is nan" in read_run(study[3]).failed


def test_one_seed_gets_no_verdict(tmp_path: Path) -> None:
    runs = [plant(tmp_path / f"{value}", value, 1, effect=value) for value in (1.0, 2.0)]
    rouge = table_of(compare(runs), "rougeL")
    assert rouge.lines[1].verdict is None and rouge.lines[1].difference is not None and rouge.lines[1].p is None
    assert "no verdict" in markdown([rouge]) and any("one seed" in note for note in rouge.notes)


def test_protocols_never_share_a_table(tmp_path: Path) -> None:
    runs = [plant(tmp_path / f"{value}", value, 1) for value in (1.0, 2.0)]
    runs += [plant(tmp_path / f"{value}-other", value, 2, protocol="f" * 16) for value in (1.0, 2.0)]
    tables = [table for table in compare(runs) if table.measure == "rougeL"]
    assert [table.protocol for table in tables] == ["0f3ac1d2e4b59687", "f" * 16]
    assert all(line.seeds == 1 for table in tables for line in table.lines)
    mixed = [plant(tmp_path / "x", 1.0, 5), plant(tmp_path / "y", 2.0, 5, protocol="f" * 16)]
    with pytest.raises(UserError, match="under the same protocol"):
        compare(mixed)


def test_baselines_by_name_by_words_and_by_folder(study, tmp_path: Path) -> None:
    for wanted in ("temperature.value=4.0", "value=4", str(study[6])):
        assert compare(study, wanted)[0].baseline == "temperature.value=4.0"
    with pytest.raises(UserError, match="fits several kinds"):
        compare(study, "temperature")
    with pytest.raises(UserError, match="is no kind"):
        compare(study, "value=9")


def test_the_same_run_does_not_count_twice(study, tmp_path: Path) -> None:
    copied = plant(tmp_path / "again", 1.0, 1)
    with pytest.raises(UserError, match="each seed once"):
        compare([*study, copied])
    assert compare([*study, study[0]]) == compare(study)


def drop_answers(run: Path, *ids: str) -> None:
    path = run / "predictions" / "student.jsonl"
    rows = [line for line in path.read_text().splitlines() if json.loads(line)["id"] not in ids]
    path.write_text("".join(f"{row}\n" for row in rows))


def test_a_run_that_lacks_rows_is_absent_by_name_and_the_others_keep_theirs(study: list[Path], tmp_path: Path) -> None:
    whole = {line.kind: line for line in table_of(compare(study), "rougeL").lines}
    drop_answers(study[4], "q-007", "q-030")
    drop_answers(study[0], "q-059")
    other = plant(tmp_path / "rows", 8.0, 1, ids=tuple(f"z-{row}" for row in range(ROWS)))
    tables = compare([*study, other])
    rouge = table_of(tables, "rougeL")
    assert rouge.rows == ROWS and {line.kind[-3:]: line.seeds for line in rouge.lines} == {
        "1.0": 2, "2.0": 2, "4.0": 3, "8.0": 0,
    }  # fmt: skip
    assert any("t2-s2: lacks answers to 2 of 60 rows (q-007, q-030)" in note for note in rouge.notes)
    assert any("t1-s1: lacks answers to 1 of 60 rows (q-059)" in note for note in rouge.notes)
    assert any("rows: lacks answers to 60 of 60 rows (q-000, q-001, q-002, ...)" in note for note in rouge.notes)
    untouched = next(line for line in rouge.lines if line.kind.endswith("4.0"))
    assert untouched.mean == whole["temperature.value=4.0"].mean, "the same rows as before"
    assert next(line for line in table_of(tables, "kl").lines if line.kind.endswith("8.0")).seeds == 1


def test_where_no_rows_are_common_the_other_measures_remain_and_say_so(tmp_path: Path) -> None:
    others = tuple(f"z-{row}" for row in range(ROWS))
    runs = [plant(tmp_path / "a", 1.0, 1), plant(tmp_path / "b", 2.0, 1, ids=others)]
    tables = compare(runs)
    assert {table.measure for table in tables} == {"kl", "ce", "top1_agreement"}
    said = "ROUGE-L of validation is not compared: b lacks answers to 60 of 60 rows"
    assert all(any(said in note for note in table.notes) for table in tables)
    for run in runs:
        change_metrics(run, lambda values: values["models"]["student"].pop("teacher_forced"))
    with pytest.raises(UserError, match=f"nothing can be compared: {said}"):
        compare(runs)


def test_answers_that_others_have_besides_are_left_out(tmp_path: Path) -> None:
    runs = [plant(tmp_path / "a", 1.0, 1, generations=1), plant(tmp_path / "b", 2.0, 1, generations=3)]
    rouge = table_of(compare(runs), "rougeL")
    assert (rouge.rows, rouge.generations) == (ROWS, 1) and rouge.lines[1].seeds == 1
    assert any("others have more (b)" in note for note in rouge.notes)


def test_rows_of_a_task_vary_together(tmp_path: Path) -> None:
    ids = tuple(f"task{100 + row // 6}_about-{row:03}" for row in range(ROWS))
    assert task_numbers(ids) == [row // 6 for row in range(ROWS)]
    assert task_numbers(["q-1", ids[0]]) is None and task_numbers(ids[:6]) is None
    scores = np.arange(12.0).reshape(2, 6)
    assert of_tasks(scores, [0, 0, 0, 1, 1, 2]).tolist() == [[1.0, 3.5, 5.0], [7.0, 9.5, 11.0]]
    runs = [plant(tmp_path / f"{v}-{s}", v, s, ids=ids) for v in (1.0, 2.0) for s in (1, 2)]
    assert any("over 10 tasks" in note for note in table_of(compare(runs), "rougeL").notes)


def test_classifiers_are_compared_by_rows_that_are_right_or_wrong(tmp_path: Path) -> None:
    runs = [
        plant_classifier(tmp_path / f"t{value}-s{seed}", value, seed, effect)
        for value, effect in ((1.0, 0.0), (2.0, 12.0)) for seed in (1, 2, 3)
    ]  # fmt: skip
    tables = compare(runs)
    accuracy = table_of(tables, "accuracy")
    assert accuracy.rows == 200 and accuracy.margin == 0.5 and accuracy.set == "validation"
    line = accuracy.lines[1]
    by_hand = [np.mean([row["label"] == row["predicted"] for row in rows_of(run)]) for run in runs[3:]]
    assert line.mean == pytest.approx(100 * np.mean(by_hand), abs=1e-9)
    assert line.verdict is not None and line.verdict.word == "better" and line.spread is not None
    assert {table.measure: (table.rows, table.set) for table in tables if table is not accuracy} == dict.fromkeys(
        ("f1", "teacher_kl", "label_ce"), (0, "validation")
    )
    f1 = table_of(tables, "f1")
    assert [line.mean for line in f1.lines] == pytest.approx([80, 92]) and f1.margin == 0.5
    assert table_of(compare(runs, margin=2.0), "f1").margin == 2.0


def test_classifiers_without_predictions_have_one_number_a_run(tmp_path: Path) -> None:
    runs = [plant_classifier(tmp_path / f"t{v}-s{s}", v, s, v, rows=False) for v in (1.0, 2.0) for s in (1, 2)]
    accuracy = table_of(compare(runs), "accuracy")
    assert accuracy.rows == 0 and 60 < accuracy.lines[0].mean < 80 and accuracy.lines[1].seeds == 2


def test_what_a_regression_says_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    runs = [plant_classifier(tmp_path / f"t{v}", v, 1) for v in (1.0, 2.0)]
    for run in runs:
        path = run / "predictions" / "student.jsonl"
        rows = [{**row, "label": 2.5, "predicted": 2.5} for row in rows_of(run)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert all(not read_run(run).answers for run in runs)


def test_the_interval_on_these_rows_is_dunnetts_and_printed(study: list[Path]) -> None:
    tables = compare(study)
    rouge, kl = table_of(tables, "rougeL"), table_of(tables, "kl")
    means = {
        line.kind: [
            100 * np.mean([row["rougeL"] for row in rows_of(path)])
            for path in study
            if path.name.startswith(f"t{line.kind[18]}")
        ]
        for line in rouge.lines
    }
    expected = dunnett(means.pop(rouge.baseline), means).comparisons
    for line in rouge.lines[1:]:
        assert line.on_these_rows is not None
        low, high = line.on_these_rows
        assert (low, high) == pytest.approx(tuple(expected[line.kind].interval))
        assert line.p == pytest.approx(expected[line.kind].p)
        assert f"{low:+.1f} to {high:+.1f}" in markdown([rouge]) and f",{float(low)!r}," in as_csv([rouge])
    assert all(line.on_these_rows is None for line in kl.lines), "there the verdict's own is one"


def test_the_winner_with_each_seed_counts_seeds_that_all_kinds_have(study: list[Path]) -> None:
    rouge = table_of(compare(study), "rougeL")
    assert rouge.winners == dict.fromkeys((1, 2, 3), "temperature.value=2.0")
    assert "Best with each seed: temperature.value=2.0 with 1, 2, 3." in markdown([rouge])
    (study[0] / "metrics.json").unlink()
    assert {*table_of(compare(study), "rougeL").winners} == {2, 3}


def test_names_tell_kinds_apart() -> None:
    kinds = [
        {"temperature.name": "dts", "temperature.rule": "gap", "loss.kd_ratio": 0.5},
        {"temperature.name": "constant", "temperature.value": 2, "loss.kd_ratio": 0.5},
    ]
    assert names_of_kinds(kinds) == [
        "temperature=dts, temperature.rule=gap",
        "temperature=constant, temperature.value=2",
    ]


def test_command_writes_markdown_and_csv(study, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = CliRunner().invoke(app, ["compare", *map(str, study), "--output", str(folder)])
    assert result.exit_code == 0, result.output
    text = (folder / "comparison.md").read_text()
    assert "better by" in text and "ROUGE-L, validation, 60 rows" in text and "| kind |" in text
    rows = list(csv.DictReader(io.StringIO((folder / "comparison.csv").read_text())))
    assert {row["measure"] for row in rows} == {"rougeL", "tokens", "kl", "ce", "top1_agreement"}
    assert as_csv(compare(study)) == (folder / "comparison.csv").read_text()
    printed = CliRunner().invoke(app, ["compare", *map(str, study), "--json"])
    assert len(json.loads(printed.stdout)["lines"]) == len(rows)


# ---------------------------------------------------------------------------------------------------- what goes wrong


def change_metrics(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((run / "metrics.json").read_text())
    change(values)
    (run / "metrics.json").write_text(json.dumps(values))


def test_a_run_that_diverged_has_null_in_its_file_and_is_no_score(study: list[Path]) -> None:
    change_metrics(study[4], lambda values: values["models"]["student"]["teacher_forced"].update(kl=None))
    line = next(line for line in table_of(compare(study), "rougeL").lines if line.kind.endswith("=2.0"))
    assert (line.seeds, line.failed) == (2, 1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kl", lambda values: values["models"]["student"]["teacher_forced"].update(kl="x")),
        ("models", lambda values: values.update(models=[1])),
        ("student", lambda values: values["models"].update(student="x")),
        ("protocol", lambda values: values.update(protocol="x")),
        ("training.seconds", lambda values: values["training"].update(seconds=[1])),
    ],
)
def test_damaged_scores_are_named(study: list[Path], name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    change_metrics(study[4], change)
    with pytest.raises(UserError, match=f"metrics.json: {name}: got .*damaged"):
        compare(study)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("twice", lambda rows: rows.append(dict(rows[0], rougeL=0.0))),
        ("expected set, id", lambda rows: rows[3].pop("id")),
        ("expected set, id", lambda rows: rows[3].update(seed="x")),
        ("rougeL: got", lambda rows: rows[3].update(rougeL=True)),
        ("broken JSON: NaN is no number", lambda rows: rows[3].update(rougeL=float("nan"))),
        ("broken JSON: Infinity is no number", lambda rows: rows[3].update(rougeL=float("inf"))),
    ],
)
def test_damaged_answers_are_named(study: list[Path], said: str, change: Callable[[list[Any]], Any]) -> None:
    path = study[4] / "predictions" / "student.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(UserError, match=f"student.jsonl: (answer|line 4:).*{said}"):
        compare(study)


def test_a_score_beyond_all_numbers_is_named(study: list[Path]) -> None:
    path = study[4] / "predictions" / "student.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps(json.loads(first) | {"rougeL": 0.5}).replace("0.5", "1e999") + "\n" + rest)
    with pytest.raises(UserError, match=r"student.jsonl: answer 1: rougeL: got inf, expected a finite number"):
        compare(study)


def test_seed_0_is_a_seed_of_its_own(tmp_path: Path) -> None:
    runs = [plant(tmp_path / f"t{value}-s{seed}", value, seed) for value in (1.0, 2.0) for seed in (0, 42)]
    assert [read_run(run).seed for run in runs] == [0, 42, 0, 42]
    assert [line.seeds for line in compare(runs)[0].lines] == [2, 2]


def test_runs_that_are_in_no_row_of_a_table_are_noted(study: list[Path]) -> None:
    change_metrics(study[4], lambda values: values["protocol"].update(fingerprint="another"))
    (study[0] / "predictions" / "student.jsonl").unlink()
    tables = compare(study)
    rouge, kl = table_of(tables, "rougeL"), table_of(tables, "kl")
    assert {line.kind: line.seeds for line in rouge.lines} == dict.fromkeys((line.kind for line in rouge.lines), 2) | {
        "temperature.value=4.0": 3
    }
    assert any("1 of 3 runs with scores are not in this table (t1-s1: not scored" in note for note in rouge.notes)
    assert all(any("(t2-s2: scored under another protocol)" in note for note in table.notes) for table in (rouge, kl))


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan, math.inf])
def test_a_margin_that_is_none_is_refused(study: list[Path], margin: float) -> None:
    with pytest.raises(UserError, match="margin"):
        compare(study, margin=margin)


def test_one_row_has_a_spread_of_seeds_and_no_more(tmp_path: Path) -> None:
    runs = [plant(tmp_path / f"t{value}-s{seed}", value, seed) for value in (1.0, 2.0) for seed in (1, 2, 3)]
    for run in runs:
        path = run / "predictions" / "student.jsonl"
        path.write_text(path.read_text().splitlines()[0] + "\n")
    for line in table_of(compare(runs), "rougeL").lines:
        assert line.spread is not None and line.spread.train == pytest.approx(line.run_sd) and not line.spread.example


def test_no_two_kinds_have_one_name() -> None:
    assert names_of_kinds([{"a": None}, {}]) == ["all (1)", "all (2)"]
    assert names_of_kinds([{"a": 1}, {"a": None}]) == ["a=1", "without a"]
    assert names_of_kinds([{"a": 1}, {"a": "1"}]) == ["a=1 (1)", "a=1 (2)"]


def change_rows(run: Path, change: Callable[[int, dict[str, Any]], None]) -> None:
    rows = rows_of(run)
    for number, row in enumerate(rows):
        change(number, row)
    (run / "predictions/student.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_where_neither_is_better_the_verdict_says_which_way(study) -> None:
    """T = 2 answers with two tokens more: longer, not better."""
    for number, run in enumerate(study):
        random = np.random.default_rng(number)
        longer = 2.0 if run.name.startswith("t2") else 0.0
        change_rows(run, lambda _, row: row.update(tokens=20 + longer + random.normal()))  # noqa: B023
    lengths = table_of(compare(study), "tokens")
    line = next(line for line in lengths.lines if line.kind == "temperature.value=2.0")
    assert line.verdict is not None and line.verdict.word == "higher" and line.verdict.sentence.startswith("higher by")
    assert line.difference == pytest.approx(2, abs=0.3)  # tokens, and no points of 100
    assert lengths.margin == pytest.approx(0.4, abs=0.02)  # 2 % of 20
    assert not any(line.near_best or line.wins for line in lengths.lines)
    turned = table_of(compare(study, "temperature.value=2.0"), "tokens")
    assert {line.verdict.word for line in turned.lines if line.verdict} == {"lower"}


def test_rows_without_a_measure_are_left_out_of_it_alone(study) -> None:
    """Of an empty answer there is no distinct-n; its length and its ROUGE-L count."""
    for number, run in enumerate(study):
        random = np.random.default_rng(number)
        change_rows(run, lambda place, row: row.update(distinct_1=0.5 + random.normal(0, 0.01), tokens=9))  # noqa: B023
    change_rows(study[4], lambda place, row: row.update(distinct_1=None) if place in (3, 7, ROWS + 3) else None)
    tables = compare(study)
    variety = table_of(tables, "distinct_1")
    assert variety.rows == ROWS - 2 and variety.generations == 2 and table_of(tables, "rougeL").rows == ROWS
    assert any("2 rows are left out" in note for note in variety.notes)
    change_rows(study[4], lambda _, row: row.update(distinct_1=None))
    assert "distinct_1" in {table.measure for table in compare(study)}  # a run that has none of it is absent
    change_rows(study[4], lambda place, row: row.update(distinct_1=0.5 if place >= ROWS else None))
    assert "distinct_1" not in {table.measure for table in compare(study)}  # no row has all its answers


def test_own_text_is_compared_where_it_was_asked_for_alike(study) -> None:
    own = {"kl": 0.8, "reverse_kl": 0.5, "fingerprint": "a"}
    for number, run in enumerate(study):
        values = {**own, "kl": 0.8 + 0.001 * number, "fingerprint": "b" if number == 4 else "a"}
        change_metrics(run, lambda metrics, values=values: metrics["models"]["student"].update(own_text=values))
        forced = {"ece": 0.1 + 0.0001 * number, "entropy": 1.0 + 0.001 * number, "reverse_kl": 0.4 + 0.001 * number}
        change_metrics(run, lambda m, forced=forced: m["models"]["student"]["teacher_forced"].update(forced))
    tables = compare(study)
    kl = table_of(tables, "own_kl")
    assert kl.set == "own text" and table_of(tables, "ece").set == "held out"
    assert {line.kind: line.seeds for line in kl.lines} == {
        f"temperature.value={t}.0": n for t, n in ((1, 3), (2, 2), (4, 3))
    }
    assert any("1 of 3 runs with scores are not in this table" in note for note in kl.notes)
    assert (
        table_of(tables, "entropy").lines[1].near_best is False and table_of(tables, "reverse_kl").lines[0].near_best
    )
