"""How sure the difference between two kinds of runs is, with the few training seeds that people can pay for.

A score varies with the training seed, with the noise of generation and with the rows it is taken over. An interval over
rows alone (as evaluation harnesses print) does not know that another seed gives another student: with 3 seeds it holds in
13 to 94 of 100 studies in the place of 95. A bootstrap over seeds cannot know that it saw three values. The crossed two-way
interval below is right whether rows or seeds are what varies most; ``tests/experiments/test_intervals.py`` simulates it.

Shapes: ``S`` training seeds, ``G`` generations, ``E`` rows of a set, or clusters of rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dts_hf.errors import UserError

Numbers: TypeAlias = NDArray[np.float64]


class Interval(NamedTuple):
    """From ``low`` to ``high``."""

    low: float
    high: float

    def inside(self, margin: float) -> bool:
        """Whether all of it is less than ``margin`` from zero."""
        return -margin < self.low and self.high < margin


@dataclass(frozen=True)
class Difference:
    """Between the mean scores of a kind of runs and those of a baseline.

    Attributes:
        mean: of the kind, less that of the baseline.
        se: standard error of ``mean``, over seeds and rows that might have been others.
        df: degrees of freedom of ``se``, by Satterthwaite.
        seeds: training seeds of the baseline and of the kind.
        examples: rows, or clusters of them.
    """

    mean: float
    se: float
    df: float
    seeds: tuple[int, int]
    examples: int

    def interval(self, level: float = 0.95) -> Interval:
        """Where the difference lies over all seeds and rows that there might be; ``level`` is a probability."""
        return _around(self.mean, self.se, _quantile(level, self.df))

    def within(self, critical: float) -> Interval:
        """The interval of ``critical`` standard errors, for a family of comparisons (``families.critical_value``)."""
        return _around(self.mean, self.se, critical)


@dataclass(frozen=True)
class Components:
    """Standard deviations of a score by where they come from, in its own unit.

    Attributes:
        train: between training seeds, of the mean over all rows.
        generation: between generations of one student, of one row.
        example: between rows, of the mean over seeds and generations.
    """

    train: float
    generation: float
    example: float


def paired_difference(baseline: ArrayLike, kind: ArrayLike, weights: Sequence[float] | None = None) -> Difference:
    """The crossed two-way interval of scores that share training seeds and rows.

    Variance of the mean over both: MS_seeds + MS_examples - MS_rest, which counts the rest once, and never less than one of
    the first two alone.

    Args:
        baseline: ``[S, E]``, the mean over generations first.
        kind: ``[S, E]``, with the same seeds and rows in the same places.
        weights: ``[E]``, rows of each cluster where ``E`` counts clusters; None: all are alike.

    Raises:
        UserError: the shapes differ, or there are fewer than two seeds or rows.
    """
    first, second = _table("baseline", baseline), _table("kind", kind)
    if first.shape != second.shape:
        raise UserError(f"scores: got the shapes {first.shape} and {second.shape}, expected the same seeds and rows")
    d = _linearised(second - first, weights)
    seeds, examples = d.shape
    squares = _mean_squares(d)
    scale = seeds * examples
    se, df = _combined(
        [(squares.seeds / scale, seeds - 1)], (squares.examples / scale, examples - 1),
        [(squares.rest / scale, (seeds - 1) * (examples - 1))],
    )  # fmt: skip
    return Difference(float(d.mean()), se, df, (seeds, seeds), examples)


def unpaired_difference(baseline: ArrayLike, kind: ArrayLike, weights: Sequence[float] | None = None) -> Difference:
    """The same where each side has training seeds of its own; the rows are the same.

    Args:
        baseline: ``[S_0, E]``.
        kind: ``[S_1, E]``, with the same rows in the same places.
        weights: as in ``paired_difference``.

    Raises:
        UserError: the rows differ in number, or there are fewer than two seeds or rows.
    """
    sides = [_table("baseline", baseline), _table("kind", kind)]
    if sides[0].shape[1] != sides[1].shape[1]:
        raise UserError(f"scores: got {sides[0].shape[1]} and {sides[1].shape[1]} rows, expected the same rows")
    first, second = (_linearised(side, weights) for side in sides)
    examples = first.shape[1]
    parts = [(_mean_squares(side), len(side)) for side in (first, second)]
    of_seeds = [(squares.seeds / (seeds * examples), seeds - 1) for squares, seeds in parts]
    rest = [(squares.rest / (seeds * examples), (seeds - 1) * (examples - 1)) for squares, seeds in parts]
    columns = second.mean(0) - first.mean(0)
    se, df = _combined(of_seeds, (float(columns.var(ddof=1)) / examples, examples - 1), rest)
    return Difference(float(columns.mean()), se, df, (len(first), len(second)), examples)


def difference_of_means(baseline: ArrayLike, kind: ArrayLike, *, paired: bool) -> Difference:
    """Between scores of which a run has one number: the rows are what they are.

    Args:
        baseline: ``[S_0]``, at least two.
        kind: ``[S_1]``, at least two.
        paired: they have the same seeds in the same places.
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (baseline, kind))
    sides = [second - first] if paired else [first, second]
    parts = [(float(side.var(ddof=1)) / len(side), len(side) - 1) for side in sides]
    variance = sum(part for part, _ in parts)
    se, df = math.sqrt(variance), _satterthwaite(variance, parts)
    mean = float(second.mean() - first.mean())
    return Difference(mean, se, df, (len(first), len(second)), 0)


def components(scores: ArrayLike) -> Components:
    """Where the variation of one kind of runs comes from, by analysis of variance.

    Args:
        scores: ``[S, G, E]``.

    Raises:
        UserError: there are fewer than three axes or an axis is empty.
    """
    y = np.asarray(scores, dtype=np.float64)
    if y.ndim != 3 or not y.size:
        raise UserError(f"scores: got the shape {y.shape}, expected [seeds, generations, rows]")
    seeds, generations, examples = y.shape
    generation = float(y.var(axis=1, ddof=1).mean()) if generations > 1 else 0.0
    means = y.mean(1)  # [S, E]
    if examples == 1:  # nothing tells the spread of seeds from that of generations
        between = float(means.var(ddof=1)) if seeds > 1 else 0.0
        noise, train = 0.0, between - generation / generations
    elif seeds == 1:
        noise, train = generation / generations, 0.0
    else:
        squares = _mean_squares(means)
        noise, train = squares.rest / seeds, (squares.seeds - squares.rest) / examples
    example = float(means.mean(0).var(ddof=1)) - noise if examples > 1 else 0.0
    return Components(*(math.sqrt(max(value, 0.0)) for value in (train, generation, example)))


# ----------------------------------------------------------------------------------------------------------------- pieces


class _Squares(NamedTuple):
    seeds: float
    examples: float
    rest: float


def _mean_squares(d: Numbers) -> _Squares:
    """Of a two-way table ``[S, E]`` with one number in a cell."""
    seeds, examples = d.shape
    rows, columns, mean = d.mean(1), d.mean(0), d.mean()
    rest = d - rows[:, None] - columns + mean
    return _Squares(
        examples * float(((rows - mean) ** 2).sum()) / (seeds - 1),
        seeds * float(((columns - mean) ** 2).sum()) / (examples - 1),
        float((rest**2).sum()) / ((seeds - 1) * (examples - 1)),
    )


def _combined(
    of_seeds: list[tuple[float, int]], of_examples: tuple[float, int], rest: list[tuple[float, int]]
) -> tuple[float, float]:
    """Standard error and degrees of freedom of (variance, degrees of freedom) of seeds, examples and the rest."""
    seeds, noise = sum(value for value, _ in of_seeds), sum(value for value, _ in rest)
    variance = max(seeds + of_examples[0] - noise, seeds, of_examples[0])
    return math.sqrt(variance), _satterthwaite(variance, [*of_seeds, of_examples, *rest])


def _satterthwaite(variance: float, parts: list[tuple[float, int]]) -> float:
    spread = sum(value**2 / df for value, df in parts)
    return max(1.0, variance**2 / spread) if spread else math.inf


def _linearised(table: Numbers, weights: Sequence[float] | None) -> Numbers:
    """Values whose plain mean over columns is the weighted one, and whose spread is that of the weighted mean."""
    if weights is None:
        return table
    share = np.asarray(weights, dtype=np.float64)
    if share.shape != table.shape[1:] or not (share > 0).all():
        raise UserError(f"weights: got {share.size} for {table.shape[1]} clusters, expected a number above 0 for each")
    share = share / share.sum()
    mean = float((table * share).sum(1).mean())
    values: Numbers = mean + len(share) * share * (table - mean)
    return values


def _table(name: str, values: ArrayLike) -> Numbers:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise UserError(
            f"{name}: got scores of the shape {table.shape}, expected [seeds, rows] with two of each at least: one training "
            "seed says nothing about another"
        )
    if not np.isfinite(table).all():
        raise UserError(f"{name}: got scores that are not finite; a run that failed is no score, and is counted apart")
    return table


def _around(mean: float, se: float, critical: float) -> Interval:
    return Interval(mean - critical * se, mean + critical * se) if se else Interval(mean, mean)


@functools.lru_cache(4096)
def _quantile(level: float, df: float) -> float:
    return float(statistics_library().t.ppf(0.5 + level / 2, df))


def statistics_library() -> Any:
    """``scipy.stats``.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        import scipy.stats as library
    except ImportError:
        raise UserError('statistics: scipy is not installed; pip install "dts-hf[stats]"') from None
    module: ModuleType = library
    return module
