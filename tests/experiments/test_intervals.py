"""Intervals and verdicts on planted data, whose truth is known; families beside scipy's and statsmodels' own tests."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from dts_hf.errors import UserError
from dts_hf.experiments.families import (
    critical_value,
    detectable,
    dunnett,
    equal_family,
    power,
    seeds_to_equate,
)
from dts_hf.experiments.intervals import (
    Difference,
    components,
    difference_of_means,
    paired_difference,
    unpaired_difference,
)
from dts_hf.experiments.verdicts import verdict

#: (between seeds, rows that a kind suits, rest): generated text on many rows, and a dense measure where seeds are all.
NOISY, DENSE = (0.3, 6.0, 8.0), (1.0, 1.0, 1.0)


def planted(random: np.random.Generator, seeds: int, examples: int, regime: tuple[float, ...], effect: float = 0.0):
    """``[S, E]`` of a baseline and of a kind that is better by ``effect``."""
    train, suits, rest = regime
    of_row = random.normal(0, 20, examples)
    sides = []
    for shift in (0.0, effect):
        of_kind = random.normal(0, suits, examples)
        of_seed = random.normal(0, train, (seeds, 1))
        sides.append(shift + of_row + of_kind + of_seed + random.normal(0, rest, (seeds, examples)))
    return sides


@pytest.mark.parametrize("difference", [paired_difference, unpaired_difference])
@pytest.mark.parametrize("regime", [NOISY, DENSE], ids=["noisy", "dense"])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_hold_the_truth_as_often_as_they_say(difference, regime, seeds) -> None:
    random, studies = np.random.default_rng(seeds), 400
    held = 0
    for _ in range(studies):
        interval = difference(*planted(random, seeds, 500, regime, effect=0.7)).interval()
        held += interval.low <= 0.7 <= interval.high
    assert 0.92 <= held / studies <= 0.98


def test_an_interval_over_rows_alone_would_not_hold_it() -> None:
    """What the crossed interval is for: with three seeds of a dense measure, rows alone are wrong most of the time."""
    random, held = np.random.default_rng(0), 0
    for _ in range(200):
        first, second = planted(random, 3, 300, DENSE)
        d = (second - first).mean(0)
        held += abs(d.mean()) < 1.96 * d.std(ddof=1) / math.sqrt(len(d))
    assert held / 200 < 0.5


def test_clusters_count_as_what_varies() -> None:
    """Rows of a task go up and down together: the interval over tasks holds the truth, that over rows does not."""
    random, studies = np.random.default_rng(3), 300
    sizes = random.integers(5, 40, 36)
    of_rows = of_tasks = 0
    for _ in range(studies):
        suits = np.repeat(random.normal(0, 6, 36), sizes)
        first = random.normal(0, 0.3, (3, 1)) + random.normal(0, 8, (3, suits.size))
        second = random.normal(0, 0.3, (3, 1)) + suits + random.normal(0, 8, (3, suits.size))
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        tasks = [np.add.reduceat(side, starts, axis=1) / sizes for side in (first, second)]
        of_tasks += _holds(paired_difference(*tasks, weights=list(sizes)))
        of_rows += _holds(paired_difference(first, second))
    assert 0.91 <= of_tasks / studies <= 0.985
    assert of_rows / studies < 0.85


def _holds(difference: Difference) -> bool:
    interval = difference.interval()
    return interval.low <= 0 <= interval.high


def test_weights_keep_the_mean_over_rows_and_equal_ones_change_nothing() -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 4, 12))
    plain, alike = paired_difference(first, second), paired_difference(first, second, [7.0] * 12)
    assert (alike.mean, alike.se, alike.df) == pytest.approx((plain.mean, plain.se, plain.df), rel=1e-9)
    weights = random.uniform(1, 9, 12)
    weighted = paired_difference(first, second, list(weights))
    assert weighted.mean == pytest.approx(float(((second - first).mean(0) * weights).sum() / weights.sum()), abs=1e-12)


def test_the_interval_of_run_means_is_the_paired_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = np.random.default_rng(5).normal(size=(2, 6))
    found = difference_of_means(first, second, paired=True).interval()
    expected = stats.ttest_rel(second, first).confidence_interval()
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_components_are_those_that_were_planted() -> None:
    random = np.random.default_rng(1)
    seeds, generations, examples = 200, 5, 400
    scores = (
        random.normal(0, 0.5, (seeds, 1, 1))
        + random.normal(0, 20, (1, 1, examples))
        + random.normal(0, 9, (seeds, generations, examples))
    )
    found = components(scores)
    assert (found.train, found.generation, found.example) == pytest.approx((0.5, 9, 20), rel=0.12)
    one_run = components(scores[:1])
    assert one_run.train == 0 and one_run.generation == pytest.approx(9, rel=0.05)
    assert one_run.example == pytest.approx(20, rel=0.12)


# ---------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (8, 4, 4, 4, 4, 4), (5, 3, 7)])
def test_dunnett_is_scipys(sizes) -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(sum(sizes))
    baseline = random.normal(size=sizes[0])
    kinds = {str(k): random.normal(0.7 * k, 1, size) for k, size in enumerate(sizes[1:])}
    found = dunnett(baseline, kinds)
    expected = stats.dunnett(*kinds.values(), control=baseline, rng=np.random.default_rng(0))
    limits = expected.confidence_interval()
    for place, comparison in enumerate(found.comparisons.values()):
        assert comparison.p == pytest.approx(expected.pvalue[place], abs=1e-3)
        assert comparison.interval == pytest.approx((limits.low[place], limits.high[place]), abs=0.02)


@pytest.mark.parametrize("df", [2, 4, 18])
def test_a_family_of_one_is_a_t_test(df) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert critical_value(equal_family(1, 3), df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-3)


@pytest.mark.parametrize("effect", [0.0, 2.0], ids=["all equal", "one better"])
def test_a_family_is_wrong_as_seldom_and_right_as_often_as_it_says(effect) -> None:
    random, studies, kinds, seeds = np.random.default_rng(7), 2000, 8, 5
    values = random.normal(size=(studies, kinds + 1, seeds))
    values[:, 1] += effect
    df = (kinds + 1) * (seeds - 1)
    sd = np.sqrt(values.var(axis=2, ddof=1).mean(1))
    reach = critical_value(equal_family(kinds, seeds), df) * sd * math.sqrt(2 / seeds)
    seen = np.abs(values[:, 1:].mean(2) - values[:, :1].mean(2)) > reach[:, None]
    assert seen[:, 1:].any(1).mean() <= 0.06
    if effect:
        assert seen[:, 0].mean() == pytest.approx(power(effect, kinds, seeds), abs=0.05)
    else:
        assert seen.any(1).mean() <= 0.06


def test_what_can_be_seen_and_how_many_seeds_it_takes() -> None:
    """Each beside its own simulation: two kinds of equal runs, or runs that differ by what is said to be seen."""
    random, studies = np.random.default_rng(11), 4000
    assert power(detectable(1, 5), 1, 5) == pytest.approx(0.8, abs=1e-6)
    seeds = seeds_to_equate(1.0)
    equal = random.normal(size=(2, studies, seeds))
    d = equal[1].mean(1) - equal[0].mean(1)
    error = np.sqrt((equal.var(axis=2, ddof=1)).mean(0) * 2 / seeds)
    from scipy.stats import t

    called = (np.abs(d) + t.ppf(0.95, 2 * (seeds - 1)) * error < 1.0).mean()
    assert called == pytest.approx(0.8, abs=0.05)


# ---------------------------------------------------------------------------------------------------------------- verdicts


def certain(mean: float, se: float, seeds: int = 3) -> Difference:
    return Difference(mean, se, 30.0, (seeds, seeds), 100)


def test_three_verdicts_and_their_sentences() -> None:
    assert verdict(certain(0.75, 0.17), 0.5, run_sd=0.3).sentence == "better by 0.4 to 1.1"
    assert verdict(certain(0.75, 0.17), 0.5, run_sd=0.3, higher_is_better=False).word == "worse"
    assert verdict(certain(0.01, 0.1), 0.5, run_sd=0.3).sentence == "equivalent within 0.5"
    undecided = verdict(certain(0.3, 0.4), 0.5, run_sd=0.45)
    assert undecided.sentence == "cannot be told apart with 3 seeds; about 15 would do"
    both = verdict(certain(0.2, 0.05), 0.5, run_sd=0.3)
    assert both.word == "equivalent" and both.sentence == "equivalent within 0.5 (better by 0.1 to 0.3)"
    assert "more rows" in verdict(certain(0.3, 0.4, seeds=40), 0.5, run_sd=0.3).sentence
    assert verdict(certain(0.75, 0.17), 0.5, run_sd=0.3, critical=6.0).word == "undecided"


@pytest.mark.parametrize("regime", [NOISY, DENSE], ids=["noisy", "dense"])
def test_equivalence_is_seldom_said_of_what_is_not(regime) -> None:
    """The truth lies at the margin, where the chance is largest."""
    random, studies = np.random.default_rng(13), 400
    margin = 1.5
    wrong = sum(
        verdict(paired_difference(*planted(random, 5, 300, regime, effect=margin)), margin, run_sd=1.0).word
        == "equivalent"
        for _ in range(studies)
    )
    assert wrong / studies <= 0.07  # 6 % and what 400 draws may add


def test_equivalence_is_statsmodels_own() -> None:
    tests = pytest.importorskip("statsmodels.stats.weightstats")
    random = np.random.default_rng(17)
    for scale in (0.3, 1.0):
        first, second = random.normal(0, scale, (2, 6))
        interval = difference_of_means(first, second, paired=True).interval(0.90)
        touched = max(
            abs(interval.low), abs(interval.high)
        )  # the margin at which they would just be called equivalent
        p = tests.ttost_paired(second, first, -touched, touched)[0]
        assert p == pytest.approx(0.05, abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], "one training seed says nothing"),
        ([[1.0, 2.0]] * 2, [[1.0, 2.0, 3.0]] * 2, "expected the same seeds and rows"),
        ([[1.0, math.nan]] * 2, [[1.0, 2.0]] * 2, "a run that failed is no score"),
    ],
)
def test_scores_that_do_not_fit_are_refused(first, second, said) -> None:
    with pytest.raises(UserError, match=said):
        paired_difference(first, second)


def test_a_margin_is_above_zero_and_scipy_is_named_where_it_is_missing(monkeypatch) -> None:
    with pytest.raises(UserError, match="margin: got 0"):
        verdict(certain(1, 1), 0, run_sd=1)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match=r"dts-hf\[stats\]"):
        dunnett([1.0, 2.0], {"a": [1.0, 3.0]})
