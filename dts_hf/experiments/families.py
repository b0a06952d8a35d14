"""Several kinds of runs against one baseline, so that the best of them is not one by chance; and what can be seen at all.

Of eight equal kinds the best looks 1.4 standard deviations better with one seed each. Dunnett's test (1955) holds the chance
of a false difference over all comparisons with one baseline at 5 in 100, with one standard deviation pooled over all kinds:
of three seeds each alone would have two degrees of freedom, and nothing would ever be seen.

Its probabilities are integrals over two variables: the baseline's mean, which all comparisons share, and the pooled standard
deviation. They are taken by Gauss quadrature, so they are the same in every call (scipy's are Monte Carlo).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dts_hf.errors import UserError
from dts_hf.experiments.intervals import Interval, Numbers, statistics_library

#: Where the largest standard deviation of a kind is more than so many times the smallest, pooling them is doubtful.
MOST_UNEQUAL = 3.0
NODES = 96
ALPHA, POWER = 0.05, 0.8
MOST_SEEDS = 10_000


class Comparison(NamedTuple):
    """One kind of runs beside the baseline.

    Attributes:
        interval: of the difference, simultaneous with those of the other kinds.
        p: adjusted for all comparisons of the family.
    """

    interval: Interval
    p: float


@dataclass(frozen=True)
class Family:
    """All comparisons with one baseline.

    Attributes:
        sd: of a run, pooled over baseline and kinds.
        unequal: the largest standard deviation of a kind over the smallest; above ``MOST_UNEQUAL`` pooling is doubtful.
        comparisons: by name.
    """

    sd: float
    unequal: float
    comparisons: dict[str, Comparison]


def dunnett(baseline: Sequence[float], kinds: Mapping[str, Sequence[float]], alpha: float = ALPHA) -> Family:
    """Dunnett's test on run means: the rows are what they are.

    Args:
        baseline: one number a run.
        kinds: by name, one number a run each.
        alpha: chance of any false difference.

    Raises:
        UserError: there is no kind, or no spread that could be estimated.
    """
    groups = [np.asarray(values, dtype=np.float64) for values in (baseline, *kinds.values())]
    df = sum(len(group) - 1 for group in groups)
    if not kinds or min(len(group) for group in groups) < 1 or df < 1:
        raise UserError("dunnett: expected a baseline, another kind of runs, and two runs of one of them at least")
    variances = [float(group.var(ddof=1)) for group in groups if len(group) > 1]
    sd = math.sqrt(sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / df)
    loadings = loadings_of(len(groups[0]), [len(group) for group in groups[1:]])
    critical = critical_value(loadings, df, alpha)
    found = {}
    for name, group in zip(kinds, groups[1:], strict=True):
        difference = float(group.mean() - groups[0].mean())
        error = sd * math.sqrt(1 / len(group) + 1 / len(groups[0]))
        p = float(difference == 0) if not error else 1 - _all_below(abs(difference) / error, loadings, df)
        reach = critical * error
        found[name] = Comparison(Interval(difference - reach, difference + reach), p)
    smallest = min(variances)
    unequal = math.sqrt(max(variances) / smallest) if smallest else math.inf if max(variances) else 1.0
    return Family(sd, unequal, found)


def critical_value(loadings: tuple[float, ...], df: float, alpha: float = ALPHA) -> float:
    """How many standard errors the largest of several differences from one baseline exceeds with chance ``alpha``.

    Args:
        loadings: of each difference on the baseline, ``sqrt(n / (n_0 + n))``; see ``loadings_of``.
        df: of the standard deviation.
        alpha: a probability.
    """
    return _critical(loadings, float(df), alpha)


def loadings_of(baseline: int, kinds: Sequence[int]) -> tuple[float, ...]:
    """How much of each kind's difference is the baseline's own chance, which all differences share.

    Args:
        baseline: runs of the baseline.
        kinds: runs of each kind.
    """
    return tuple(math.sqrt(count / (baseline + count)) for count in kinds)


def equal_family(kinds: int, seeds: int, baseline_seeds: int | None = None) -> tuple[float, ...]:
    """``loadings_of`` so many kinds with ``seeds`` runs each."""
    return loadings_of(baseline_seeds or seeds, [seeds] * kinds)


def power(effect: float, kinds: int, seeds: int, baseline_seeds: int | None = None, alpha: float = ALPHA) -> float:
    """The chance that one kind's difference of ``effect`` is seen, in a family of ``kinds``.

    Args:
        effect: in standard deviations of a run.
        kinds: how many are compared with the baseline.
        seeds: of each kind.
        baseline_seeds: of the baseline; None: as many.
        alpha: chance of any false difference.
    """
    of_baseline = baseline_seeds or seeds
    df = kinds * (seeds - 1) + of_baseline - 1
    critical = critical_value(equal_family(kinds, seeds, of_baseline), df, alpha)
    shift = effect / math.sqrt(1 / seeds + 1 / of_baseline)
    library = statistics_library()
    return float(library.nct.sf(critical, df, shift) + library.nct.cdf(-critical, df, shift))


def detectable(kinds: int, seeds: int, baseline_seeds: int | None = None, chance: float = POWER) -> float:
    """The smallest difference, in standard deviations of a run, that is seen.

    Args:
        kinds: how many are compared with the baseline.
        seeds: of each kind.
        baseline_seeds: of the baseline; None: as many.
        chance: that it is seen, a probability.
    """
    low, high = 0.0, 1.0
    while power(high, kinds, seeds, baseline_seeds) < chance:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, kinds, seeds, baseline_seeds) < chance else (low, middle)
    return high


def seeds_to_equate(margin: float, chance: float = POWER, alpha: float = ALPHA) -> int:
    """Seeds of each of two kinds that are equal with which two one-sided tests say so with ``chance``.

    Args:
        margin: what counts as equal, in standard deviations of a run.
        chance: a probability.
        alpha: of each one-sided test.
    """
    return _smallest(lambda seeds: _power_of_equivalence(margin, seeds, alpha), chance)


# ----------------------------------------------------------------------------------------------------------------- pieces


def _smallest(chance_with: Callable[[int], float], chance: float) -> int:
    high = 2
    while chance_with(high) < chance:
        if high > MOST_SEEDS:
            return MOST_SEEDS
        high *= 2
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if chance_with(middle) < chance else (low, middle)
    return high


def _power_of_equivalence(margin: float, seeds: int, alpha: float) -> float:
    """Two one-sided t tests (Schuirmann 1987) on equal means with a common standard deviation, which is integrated over."""
    library, df = statistics_library(), 2 * (seeds - 1)
    error, critical = math.sqrt(2 / seeds), float(library.t.ppf(1 - alpha, df))
    scale, weight = _scales(float(df))
    room = np.maximum(margin / error - critical * scale, 0.0)
    return float((weight * (2 * library.norm.cdf(room) - 1)).sum())


@functools.lru_cache(1024)
def _critical(loadings: tuple[float, ...], df: float, alpha: float) -> float:
    low, high = 0.0, 1.0
    while 1 - _all_below(high, loadings, df) > alpha:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - _all_below(middle, loadings, df) > alpha else (low, middle)
    return high


def _all_below(bound: float, loadings: tuple[float, ...], df: float) -> float:
    """The chance that no standardised difference exceeds ``bound`` where all kinds are equal.

    Given the baseline's mean z and the standard deviation s they are independent: |T_i| <= c is
    |l_i z + sqrt(1 - l_i^2) x_i| <= c s with standard normal x_i.
    """
    cdf = statistics_library().norm.cdf
    z, of_z = _normal_nodes()
    s, of_s = _scales(df)
    inside = np.ones((len(z), len(s)))
    for loading in loadings:
        rest = math.sqrt(1 - loading**2)
        shift, reach = loading * z[:, None], bound * s[None, :]
        inside *= cdf((reach - shift) / rest) - cdf((-reach - shift) / rest)
    return float(of_z @ inside @ of_s)


@functools.cache
def _normal_nodes() -> tuple[Numbers, Numbers]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, weights / weights.sum()


@functools.lru_cache(1024)
def _scales(df: float) -> tuple[Numbers, Numbers]:
    """Values of the pooled standard deviation over the true one, and their probabilities, by its quantiles."""
    if math.isinf(df):
        return np.ones(1), np.ones(1)
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    # Over the quantiles of chi: smooth but at the ends, where nothing depends on it
    s = np.sqrt(statistics_library().chi2.ppf((nodes + 1) / 2, df) / df)
    return s, weights / 2
