"""``dts-hf compare``: finished runs of several kinds side by side, with how sure each difference is.

Runs of one kind have the same recipe but for the seed. A table is one measure of one set, made under one protocol: each
kind with its mean, where its variation comes from, its difference from the baseline and a verdict.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dts_hf.errors import UserError, nearest
from dts_hf.experiments.families import MOST_UNEQUAL, Family, critical_value, detectable, dunnett, loadings_of
from dts_hf.experiments.intervals import (
    Components,
    Difference,
    Numbers,
    components,
    difference_of_means,
    paired_difference,
    unpaired_difference,
)
from dts_hf.experiments.runs import DENSE, MAY_LACK, OF_ANSWERS, OF_OWN_TEXT, Run, names_of_kinds, read_run
from dts_hf.experiments.verdicts import Verdict, digits_of, verdict

#: The largest difference that would not matter, in the unit of the measure: points of ROUGE-L, a share, and of nats and
#: tokens a share of the baseline's own.
MARGINS = {"rougeL": 0.5, "top1_agreement": 0.01, "ece": 0.01, "distinct_1": 0.01, "distinct_2": 0.01}
MARGIN_SHARE = 0.02
TASK = re.compile(r"(task[0-9]+)[_-]")


@dataclass(frozen=True)
class Kind:
    """Runs that differ in their seed alone.

    Attributes:
        name: what tells them from the others.
        runs: that have scores, by seed.
        failed: those that have none, with why.
        absent: those that have others than a table is of: another protocol, or not this measure of this set.
    """

    name: str
    runs: Mapping[int, Run]
    failed: Sequence[Run]
    absent: Sequence[Run] = ()

    def those(self, keep: Callable[[Run], bool]) -> Kind:
        """The same with the runs that ``keep`` says yes to; the others are absent."""
        kept = {seed: run for seed, run in self.runs.items() if keep(run)}
        absent = [run for seed, run in self.runs.items() if seed not in kept]
        return Kind(self.name, kept, self.failed, [*self.absent, *absent])


@dataclass(frozen=True)
class Line:
    """One kind of runs in a table; numbers in the unit of the measure.

    Attributes:
        kind: its name.
        seeds: of training.
        failed: how many runs have no scores.
        mean: over seeds, generations and rows; NaN without a run.
        spread: where the variation comes from; None where a run has one number.
        run_sd: of a run's score, between seeds; NaN of one.
        difference: from the baseline, over seeds and rows; None of the baseline, of one seed, and where rows are unknown.
        p: of Dunnett's test on these rows, adjusted; None where there is none.
        verdict: with the interval of the difference; None of the baseline and of one seed.
        near_best: its mean is within the margin of the best mean; never where neither more nor less is better.
        wins: seeds with which it is the best of all kinds.
        seconds: of training, the mean.
    """

    kind: str
    seeds: int
    failed: int
    mean: float
    spread: Components | None
    run_sd: float
    difference: float | None
    p: float | None
    verdict: Verdict | None
    near_best: bool
    wins: int
    seconds: float


@dataclass(frozen=True)
class Table:
    """One measure of one set under one protocol.

    Attributes:
        set: of rows; ``held out`` for losses of the data's text, ``own text`` for those of the student's.
        measure: a key of ``OF_ANSWERS`` or ``DENSE``.
        label: of the measure, for people.
        protocol: fingerprint of how answers were made.
        margin: the largest difference that would not matter.
        baseline: name of the kind that the others are compared with.
        rows: how many there are; 0 where a run has one number.
        generations: of each run.
        lines: the baseline first, then by mean, the best first.
        detectable: difference that would be seen in 4 of 5 studies of so many seeds; NaN where it cannot be said.
        notes: what a reader has to know.
    """

    set: str
    measure: str
    label: str
    protocol: str
    margin: float
    baseline: str
    rows: int
    generations: int
    lines: Sequence[Line]
    detectable: float
    notes: Sequence[str]


def compare(paths: Iterable[Path], baseline: str | None = None, margin: float | None = None) -> list[Table]:
    """Every measure that finished runs have in common, a table each.

    Args:
        paths: run directories; at least two kinds of runs.
        baseline: a run directory, or words of the name of a kind; None: the kind of the first run.
        margin: the largest difference of ROUGE-L that would not matter, in points of 100; None: 0.5.

    Raises:
        UserError: a folder is no run or its files are damaged, twice the same seed of one kind, one kind alone, there is no
            such baseline, or the margin is not above 0.
    """
    if margin is not None and not (margin > 0 and math.isfinite(margin)):
        raise UserError(f"margin: got {margin}, expected a number of points above 0")
    kinds = _kinds([read_run(path) for path in dict.fromkeys(paths)])
    if len(kinds) < 2:
        raise UserError("compare: all runs have the same recipe but for seeds; expected at least two kinds of runs")
    base = _baseline(kinds, baseline)
    ordered = [base, *(kind for kind in kinds if kind is not base)]
    margins = MARGINS if margin is None else {**MARGINS, "rougeL": margin}
    tables = []
    for protocol in dict.fromkeys(run.protocol for kind in ordered for run in kind.runs.values()):
        chosen = [_of_protocol(kind, protocol) for kind in ordered]
        if sum(bool(kind.runs) for kind in chosen) < 2 or not chosen[0].runs:
            continue
        tables += [table for table in _tables(chosen, protocol, margins) if table is not None]
    if not tables:
        raise UserError(
            "compare: no measure is there of the baseline and of another kind under the same protocol, so nothing can be "
            "compared; score the runs alike (dts-hf evaluate). Read are ROUGE-L, length and variety of answers, held-out "
            "losses and KL on the student's own text, none of which a classifier (task:) has"
        )
    return tables


def _kinds(runs: Sequence[Run]) -> list[Kind]:
    groups: list[tuple[Mapping[str, object], list[Run]]] = []
    for run in runs:
        for settings, members in groups:
            if settings == run.settings:
                members.append(run)
                break
        else:
            groups.append((run.settings, [run]))
    kinds = []
    for name, (_, members) in zip(names_of_kinds([settings for settings, _ in groups]), groups, strict=True):
        by_seed: dict[int, Run] = {}
        for run in members:
            if run.failed:
                continue
            if run.seed in by_seed:
                raise UserError(
                    f"{run.path}: has the recipe and the seed ({run.seed}) of {by_seed[run.seed].path}; expected each seed "
                    "once, or the same run would count twice"
                )
            by_seed[run.seed] = run
        kinds.append(Kind(name, by_seed, [run for run in members if run.failed]))
    return kinds


def _baseline(kinds: Sequence[Kind], wanted: str | None) -> Kind:
    if wanted is None:
        return kinds[0]
    place = os.path.realpath(wanted.replace("\0", ""))
    for kind in kinds:
        paths = [os.path.realpath(run.path) for run in (*kind.runs.values(), *kind.failed)]
        if kind.name == wanted or place in paths:
            return kind
    found = [kind for kind in kinds if wanted in kind.name]
    if len(found) != 1:
        names = [kind.name for kind in kinds]
        which = "fits several kinds" if found else "is no kind of these runs"
        raise UserError(
            f"baseline: {wanted!r} {which}, expected one of {'; '.join(names)}, or a run directory.{nearest(wanted, names)}"
        )
    return found[0]


def _of_protocol(kind: Kind, protocol: str) -> Kind:
    return kind.those(lambda run: run.protocol == protocol)


def _tables(kinds: Sequence[Kind], protocol: str, margins: Mapping[str, float]) -> Iterable[Table | None]:
    runs = kinds[0].runs.values()
    of_rows = [(name, measure) for run in runs for name, measures in run.answers.items() for measure in measures]
    for set_name, measure in dict.fromkeys(of_rows):
        yield _table_of_rows(kinds, set_name, measure, protocol, margins.get(measure))
    for measure in dict.fromkeys(measure for run in runs for measure in run.dense):
        yield _table_of_numbers(kinds, measure, protocol, margins.get(measure))


def _table_of_rows(
    kinds: Sequence[Kind], set_name: str, measure: str, protocol: str, margin: float | None
) -> Table | None:
    """A measure of rows: every row has it, or (``MAY_LACK``) those that have it in all runs are compared."""
    label, higher = OF_ANSWERS[measure]
    scored = [kind.those(lambda run: measure in run.answers.get(set_name, {})) for kind in kinds]
    if not scored[0].runs or sum(bool(kind.runs) for kind in scored) < 2:
        return None
    keys = [set(run.answers[set_name][measure]) for kind in scored for run in kind.runs.values()]
    common = sorted(set.intersection(*keys))
    if measure not in MAY_LACK and any(len(of_run) != len(common) for of_run in keys):
        raise UserError(
            f"compare: the runs have answered other rows of {set_name} or with other seeds ({len(common):,} of "
            f"{max(len(of_run) for of_run in keys):,} answers are common to all); expected the same rows"
        )
    generations = sorted({seed for of_run in keys for _, seed in of_run})
    counts = Counter(row for row, _ in common)
    rows = sorted(row for row, count in counts.items() if count == len(generations))
    left_out = len({row for of_run in keys for row, _ in of_run}) - len(rows)
    if not rows:
        return None
    scores = {kind.name: _scores(kind, set_name, measure, rows, generations) for kind in scored}
    means = {name: table.mean((1, 2)) for name, table in scores.items() if len(table)}
    spreads = {name: components(table) for name, table in scores.items() if len(table)}
    tasks = task_numbers(rows)
    margin = margin or _share_of(means[kinds[0].name])
    lines, notes, seen = _lines(scored, means, spreads, scores, margin, higher, tasks)
    if left_out:
        notes.append(f"{left_out} rows are left out: in some run the answer is too short to have this measure")
    if tasks is not None:
        notes.append(f"rows of a task vary together: intervals are over {max(tasks) + 1} tasks")
    return Table(
        set_name, measure, label, protocol, margin, kinds[0].name, len(rows), len(generations), lines, seen, notes
    )


def _scores(kind: Kind, set_name: str, measure: str, rows: Sequence[str], generations: Sequence[int]) -> Numbers:
    """``[S, G, E]``, seeds in order."""
    tables = [kind.runs[seed].answers[set_name][measure] for seed in sorted(kind.runs)]
    values = [[[table[row, seed] for row in rows] for seed in generations] for table in tables]
    return np.asarray(values, dtype=np.float64).reshape(len(tables), len(generations), len(rows))


def _table_of_numbers(kinds: Sequence[Kind], measure: str, protocol: str, margin: float | None) -> Table | None:
    """A measure of which a run has one number; its rows are what they are."""
    label, higher = DENSE[measure]
    asked = next((run.own_text for run in kinds[0].runs.values() if measure in run.dense), "")
    same = [kind.those(lambda run: measure not in OF_OWN_TEXT or run.own_text == asked) for kind in kinds]
    scored = [kind.those(lambda run: measure in run.dense) for kind in same]
    if not scored[0].runs or sum(bool(kind.runs) for kind in scored) < 2:
        return None
    means = {
        kind.name: np.asarray([kind.runs[s].dense[measure] for s in sorted(kind.runs)]) for kind in scored if kind.runs
    }
    margin = margin or _share_of(means[kinds[0].name])
    lines, notes, seen = _lines(scored, means, {}, {}, margin, higher)
    where = "own text" if measure in OF_OWN_TEXT else "held out"
    return Table(where, measure, label, protocol, margin, kinds[0].name, 0, 1, lines, seen, notes)


def _share_of(of_baseline: Numbers) -> float:
    """The margin of a measure that has none of its own: a share of the baseline's mean."""
    return float(f"{MARGIN_SHARE * abs(float(of_baseline.mean())):.2g}") or MARGIN_SHARE


def _lines(
    kinds: Sequence[Kind],
    means: Mapping[str, Numbers],
    spreads: Mapping[str, Components],
    scores: Mapping[str, Numbers],
    margin: float,
    higher: bool | None,
    tasks: Sequence[int] | None = None,
) -> tuple[list[Line], list[str], float]:
    """The lines, what a reader has to know, and what could have been seen."""
    base, notes = kinds[0], []
    family = _family(base.name, means)
    others = [kind for kind in kinds[1:] if kind.runs]
    sign = 1 if higher else -1
    best = max(float(values.mean()) * sign for values in means.values())
    wins = _wins(kinds, means, higher)
    lines = []
    for kind in kinds:
        values = means.get(kind.name, np.asarray([]))
        mean = float(values.mean()) if len(values) else math.nan
        difference = p = said = None
        if kind is not base and len(values):
            difference = mean - float(means[base.name].mean())
            p = family.comparisons[kind.name].p if family else None
            found = _difference(base, kind, scores, means, tasks)
            if found is not None and family is not None:
                critical = _critical(base, others, found)
                said = verdict(
                    found, margin, run_sd=family.sd, critical=critical, higher_is_better=higher,
                    digits=digits_of(margin),
                )  # fmt: skip
        lines.append(
            Line(
                kind.name, len(values), len(kind.failed), mean, spreads.get(kind.name),
                float(values.std(ddof=1)) if len(values) > 1 else math.nan, difference, p, said,
                bool(len(values)) and higher is not None and best - mean * sign <= margin, wins.get(kind.name, 0),
                float(np.mean([run.seconds for run in kind.runs.values()])) if kind.runs else math.nan,
            )
        )  # fmt: skip
    notes += _notes(kinds, family, means)
    seeds = min(len(values) for values in means.values())
    seen = detectable(len(others), seeds) * family.sd if family and family.sd and seeds > 1 else math.nan
    ranked = sorted(lines[1:], key=lambda line: (math.isnan(line.mean), -line.mean * sign))
    return [lines[0], *ranked], notes, seen


def _family(base: str, means: Mapping[str, Numbers]) -> Family | None:
    others = {name: list(values) for name, values in means.items() if name != base}
    if sum(len(values) - 1 for values in means.values()) < 1:
        return None
    return dunnett(list(means[base]), others)


def task_numbers(rows: Sequence[str]) -> list[int] | None:
    """The number of each row's task where the ids of all rows begin with one, as those of S-NI do; None: they do not.

    Rows of a task are easy or hard together, so tasks, not rows, are what might have been others.
    """
    found = [TASK.match(row) for row in rows]
    if not all(found):
        return None
    names = [match[1] for match in found if match]
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [order[name] for name in names] if len(order) > 1 else None


def of_tasks(scores: Numbers, tasks: Sequence[int]) -> Numbers:
    """Scores ``[S, E]`` as means of tasks, ``[S, tasks]``."""
    sums = np.stack([np.bincount(tasks, weights=row) for row in scores])
    means: Numbers = sums / np.bincount(tasks)
    return means


def _difference(
    base: Kind,
    kind: Kind,
    scores: Mapping[str, Numbers],
    means: Mapping[str, Numbers],
    tasks: Sequence[int] | None,
) -> Difference | None:
    """Over seeds and rows where rows are known, else over seeds; None where a side has one run."""
    if min(len(base.runs), len(kind.runs)) < 2:
        return None
    paired = sorted(base.runs) == sorted(kind.runs)
    if scores and scores[base.name].shape[2] > 1:
        first, second = (scores[name].mean(1) for name in (base.name, kind.name))  # [S, E]
        weights = None
        if tasks is not None:
            first, second, weights = of_tasks(first, tasks), of_tasks(second, tasks), np.bincount(tasks).tolist()
        return (paired_difference if paired else unpaired_difference)(first, second, weights)
    return difference_of_means(means[base.name], means[kind.name], paired=paired)


def _critical(base: Kind, others: Sequence[Kind], difference: Difference) -> float:
    """Dunnett's value at the degrees of freedom of this difference: an approximation where rows vary too."""
    loadings = loadings_of(len(base.runs), [len(kind.runs) for kind in others])
    return critical_value(loadings, round(difference.df, 1))


def _wins(kinds: Sequence[Kind], means: Mapping[str, Numbers], higher: bool | None) -> dict[str, int]:
    """With how many of the seeds that all kinds have each one is the best; none where neither more nor less is better."""
    if higher is None:
        return {}
    common = set.intersection(*(set(kind.runs) for kind in kinds if kind.runs))
    won: dict[str, int] = {}
    for seed in common:
        of_seed = {kind.name: float(means[kind.name][sorted(kind.runs).index(seed)]) for kind in kinds if kind.runs}
        best = (max if higher else min)(of_seed.values())
        winners = [name for name, value in of_seed.items() if value == best]
        if len(winners) == 1:
            won[winners[0]] = won.get(winners[0], 0) + 1
    return won


def _notes(kinds: Sequence[Kind], family: Family | None, means: Mapping[str, Numbers]) -> list[str]:
    notes = [
        f"{kind.name}: {len(kind.failed)} of {len(kind.failed) + len(kind.runs)} runs have no scores "
        f"({'; '.join(f'{run.path.name}: {run.failed}' for run in kind.failed)}); they are in no mean"
        for kind in kinds
        if kind.failed
    ]
    notes += [
        f"{kind.name}: {len(kind.absent)} of {len(kind.absent) + len(kind.runs)} runs with scores are not in this table "
        f"({', '.join(run.path.name for run in kind.absent)}): scored under another protocol, or not for this measure"
        for kind in kinds
        if kind.absent
    ]
    if len({tuple(sorted(kind.runs)) for kind in kinds if kind.runs}) > 1:
        notes.append("the kinds have other seeds, so runs are not paired by seed and intervals are wider")
    if any(len(values) < 2 for values in means.values()):
        notes.append("a kind with one seed has no interval: one training seed says nothing about another")
    if family is not None and family.unequal > MOST_UNEQUAL:
        notes.append(
            f"the spread between seeds differs {family.unequal:.1f} times between kinds, so pooling it is doubtful"
        )
    return notes
