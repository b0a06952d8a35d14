"""``report.html`` of a comparison: what it says, and that it says nothing of the machine and runs nothing of a model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from dts_hf.experiments.compare import compare_kinds
from dts_hf.experiments.kinds import read_kinds
from dts_hf.experiments.report import choose_samples, forest, render_page
from dts_hf.experiments.tables import BEST_FIRST
from dts_hf.experiments.trajectories import MOST_KINDS, MOST_STEPS, band, bands, style_of
from dts_hf.experiments.verdicts import Word
from dts_hf.reporting.curves import Curve
from tests.support.made_run import SCRIPT
from tests.support.planted_runs import plant, with_answers


def make_page(runs: list[Path]) -> str:
    kinds = read_kinds(runs)
    return render_page(kinds, compare_kinds(kinds, kinds[0]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three kinds of three seeds, one of which did not end."""
    folder = tmp_path_factory.mktemp("runs")
    found = [
        with_answers(plant(folder / f"t{value}-s{seed}", float(value), seed, effect))
        for value, effect in ((1, 0.0), (2, 6.0), (4, -6.0))
        for seed in (1, 2, 3)
    ]
    (found[-1] / "metrics.json").unlink()
    return found


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> str:
    return make_page(runs)


def test_nothing_is_fetched_or_run_and_no_folder_is_named(page: str, runs: list[Path]) -> None:
    addresses = re.findall(r"(?:src|href|srcset)=\"([^\"]*)\"", page)
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    assert "url(" not in page and "@import" not in page and "http" not in re.sub(r"data:\S+", "", page)
    assert SCRIPT not in page and "&lt;script&gt;alert" in page
    assert "/home/anna" not in page and str(runs[0].parent) not in page


def test_verdicts_are_words_beside_a_sign_and_headers_can_be_sorted_by(page: str) -> None:
    assert re.search(r'class="verdict better"><i aria-hidden="true">▲</i>better by [0-9.]+ to [0-9.]+', page)
    assert re.search(r'class="verdict worse"><i aria-hidden="true">▼</i>worse by', page)
    heads = re.findall(r'<th scope="col" aria-sort="none"[^>]*><button type="button">([^<]+)</button>', page)
    assert heads[:4] == ["kind", "verdict", "difference", "interval"] and "on these rows" in heads and "p" in heads
    (mean,) = re.findall(r'value=<wbr>2\.<wbr>0</th>.*?data-sort="([^"]*)">\+', page, re.DOTALL)[:1]
    assert float(mean) == pytest.approx(6, abs=1)


def test_where_neither_side_is_better_the_page_says_which_way(tmp_path: Path) -> None:
    """Entropy goes up with T: every word of a verdict has a sign and a place in the order."""
    found = [plant(tmp_path / f"t{value}-s{seed}", float(value), seed, 0.0) for value in (1, 2) for seed in (1, 2, 3)]
    for number, run in enumerate(found):
        metrics = json.loads((run / "metrics.json").read_text())
        entropy = 1.0 + 0.001 * number + (1.0 if number > 2 else 0.0)
        metrics["models"]["student"]["teacher_forced"]["entropy"] = entropy
        (run / "metrics.json").write_text(json.dumps(metrics))
    page = make_page(found)
    assert (
        '<span class="verdict higher"><i aria-hidden="true">↑</i>higher by' in page
        and "neither side is better" in page
    )
    assert {*get_args(Word)} == {*BEST_FIRST}


def test_failed_runs_are_listed_with_why(page: str) -> None:
    assert re.search(r'id="failed".*t4-s3.*it has not ended.*temperature\.value=4\.0', page, re.DOTALL)
    assert "t4-s3 (seed 3, failed)" in page and "1 of 3 runs have no scores" in page


def test_the_winner_with_each_seed_is_named(page: str) -> None:
    assert "Best with each seed: temperature.value=2.0 with 1, 2." in page


def test_samples_are_the_same_rows_of_the_first_seed_of_each_kind(runs: list[Path]) -> None:
    kinds = read_kinds(runs)
    samples, names = choose_samples(kinds)
    assert names == [kind.name for kind in kinds] and len(samples) == 6
    of_first = {
        row["id"]: row for row in map(json.loads, (runs[3] / "predictions/student.jsonl").read_text().splitlines())
        if row["seed"] == 10
    }  # fmt: skip
    for sample in samples:
        assert [answer.label for answer in sample.answers] == names
        assert sample.answers[1].score == pytest.approx(100 * of_first[sample.key]["rougeL"], abs=1)
    scores = [sample.answers[0].score for sample in samples]
    assert scores == sorted(scores, key=lambda score: -(score or 0)), "from the baseline's best to its worst"


def test_answers_under_another_protocol_are_not_laid_beside(tmp_path: Path) -> None:
    runs = [with_answers(plant(tmp_path / f"t{v}", v, 1, protocol=p)) for v, p in ((1.0, "a"), (2.0, "b"), (4.0, "a"))]
    assert choose_samples(read_kinds(runs))[1] == ["temperature.value=1.0", "temperature.value=4.0"]


def test_places_of_a_forest_are_those_of_its_numbers(runs: list[Path]) -> None:
    kinds = read_kinds(runs)
    (table,) = [one for one in compare_kinds(kinds, kinds[0]) if one.measure == "rougeL"]
    found = forest(table)
    assert found is not None and [row.word for row in found.rows] == ["better", "worse"]
    scale = (found.margin[1] - found.margin[0]) / (2 * table.margin)
    for row, line in zip(found.rows, table.lines[1:], strict=True):
        assert line.verdict is not None and row.interval is not None and row.on_these_rows is not None
        assert row.place - found.zero == pytest.approx(scale * (line.difference or 0), abs=0.2)
        assert row.interval[1] - row.interval[0] == pytest.approx(
            scale * (line.verdict.interval.high - line.verdict.interval.low), abs=0.2
        )
        assert min(row.interval) >= 0 and max(row.interval) <= 1000
        assert line.verdict.sentence in row.said
    assert all(0 <= place <= 1000 for place, _ in found.ticks)


def test_a_band_is_of_the_steps_that_all_runs_have() -> None:
    whole, short = Curve([1, 2, 3, 4], [1.0, math.nan, 3.0, 9.0]), Curve([2, 3], [4.0, 5.0])
    found = band([whole, short, Curve([1, 2], [math.nan, math.nan])])
    assert found is not None and found.runs == 2
    assert found.mean == Curve([3], [4.0]) or found.mean == Curve([2, 3], [3.0, 4.0])
    assert found.low.values[-1] == 3.0 and found.high.values[-1] == 5.0
    assert band([Curve([], [])]) is None and band([Curve([1, 2], [1, 1]), Curve([3, 4], [1, 1])]) is None


def test_a_long_log_is_thinned_and_holds_its_ends() -> None:
    steps = np.arange(1, 100_001, dtype=float)
    found = band([Curve(steps.tolist(), (steps * k).tolist()) for k in (1, 3)])
    assert found is not None and len(found.mean.steps) == MOST_STEPS
    assert (found.mean.values[0], found.mean.values[-1]) == (2, 200_000)


def test_kinds_beyond_those_with_a_style_of_their_own_are_named_and_not_drawn(tmp_path: Path) -> None:
    assert len({style_of(place) for place in range(MOST_KINDS)}) == MOST_KINDS
    runs = [plant(tmp_path / f"t{value}", float(value), 1) for value in range(1, MOST_KINDS + 3)]
    for run in runs[1:]:
        (run / "log.jsonl").write_text("")
    page = make_page(runs)
    assert f"after the first {MOST_KINDS} in the order of the first table" in page
    assert "Not logged: temperature.value=" in page


def test_quantities_that_no_run_has_logged_have_no_figure(runs: list[Path]) -> None:
    kinds = read_kinds(runs)
    found = bands(kinds)
    assert {*found} == {"temperature", "gap", "eval_kl", "eval_ce_loss", "rougeL", "loss"}
    of_kind = found["rougeL"][0]
    assert of_kind is not None and of_kind.runs == 3 and max(of_kind.mean.values) == pytest.approx(46.3)
    assert found["rougeL"][2] is not None and found["rougeL"][2].runs == 2, "the run that failed is in no band"
