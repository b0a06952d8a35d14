"""One of three sentences about a difference, written from its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dts_hf.errors import UserError
from dts_hf.experiments.families import MOST_SEEDS, seeds_to_equate
from dts_hf.experiments.intervals import Difference, Interval

Word: TypeAlias = Literal["better", "worse", "higher", "lower", "equivalent", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What can be said of a kind of runs beside the baseline.

    Attributes:
        word: ``undecided`` is no finding: neither that they differ nor that they do not. ``higher`` and ``lower`` where
            neither is better.
        sentence: the same for people, with its numbers.
        interval: of the difference, as it decided whether there is one.
    """

    word: Word
    sentence: str
    interval: Interval


def verdict(
    difference: Difference,
    margin: float,
    *,
    run_sd: float,
    critical: float | None = None,
    higher_is_better: bool | None = True,
    digits: int = 1,
) -> Verdict:
    """Whether a kind of runs is better than the baseline, worse, equivalent to it, or cannot be told apart.

    Two one-sided tests at 5 in 100 say that it is equivalent: the 90 % interval lies within the margin. A difference that is
    certain but within the margin is equivalent, and its sentence has both.

    Args:
        difference: see ``intervals``.
        margin: the largest difference that would not matter, set before the runs were seen; in the unit of the score.
        run_sd: standard deviation of a run's score, for how many seeds would do.
        critical: of a family of comparisons (``families.critical_value``), in standard errors; None: this is the only one.
        higher_is_better: of the score; None: neither more nor less is better.
        digits: behind the point, in the sentence.

    Raises:
        UserError: the margin is not above 0.
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise UserError(
            f"margin: got {margin}, expected a number above 0: the largest difference that would not matter"
        )
    interval = difference.interval() if critical is None else difference.within(critical)
    equivalent = difference.interval(0.90).inside(margin)
    differs = interval.low > 0 or interval.high < 0
    word: Word
    if higher_is_better is None:
        word = "higher" if difference.mean > 0 else "lower"
    else:
        word = "better" if (difference.mean > 0) == higher_is_better else "worse"
    ends = sorted((abs(interval.low), abs(interval.high)))
    words = f"{word} by {ends[0]:.{digits}f} to {ends[1]:.{digits}f}"
    if equivalent:
        beside = f" ({words})" if differs else ""
        return Verdict("equivalent", f"equivalent within {margin:g}{beside}", interval)
    if differs:
        return Verdict(word, words, interval)
    seeds = min(difference.seeds)
    return Verdict("undecided", f"cannot be told apart with {seeds} seeds{_enough(margin, run_sd, seeds)}", interval)


def digits_of(margin: float) -> int:
    """Digits behind the point with which a tenth of ``margin`` can be seen."""
    return max(1, 1 - math.floor(math.log10(margin)) - (margin >= 0.5))


def _enough(margin: float, run_sd: float, seeds: int) -> str:
    """How many would do: those with which equal ones are called equivalent, which is also enough to see the margin."""
    if not (run_sd > 0 and math.isfinite(run_sd)):
        return ""
    enough = seeds_to_equate(margin / run_sd)
    if enough >= MOST_SEEDS:
        return f"; not even {MOST_SEEDS:,} would do for a margin of {margin:g}"
    # The rows may be what is short, not the seeds
    return f"; about {enough} would do" if enough > seeds else "; more rows would help more than more seeds"
