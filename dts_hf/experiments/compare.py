"""``dts-hf compare``: finished runs of several kinds side by side, with how sure each difference is.

Runs of one kind have the same recipe but for the seed. A table is one measure of one set, made under one protocol: each
kind with its mean, where its variation comes from, its difference from the baseline and a verdict.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dts_hf.errors import UserError
from dts_hf.experiments.families import MOST_UNEQUAL, Family, critical_value, detectable, dunnett, loadings_of
from dts_hf.experiments.intervals import (
    Components,
    Difference,
    Interval,
    Numbers,
    components,
    difference_of_means,
    paired_difference,
    unpaired_difference,
)
from dts_hf.experiments.kinds import ONE_KIND, Kind, baseline_of, read_kinds
from dts_hf.experiments.runs import MAY_LACK, OF_ANSWERS, OF_RUNS, OWN_TEXT, Run
from dts_hf.experiments.verdicts import Verdict, digits_of, verdict

#: Measures in points of 100, and the largest difference of them that would not matter.
IN_POINTS = ("rougeL", "accuracy", "f1", "matthews_correlation", "pearson", "spearmanr")
POINTS = 0.5
#: The same of others, as a share; of nats and tokens it is a share of the baseline's own.
MARGINS = dict.fromkeys(("top1_agreement", "teacher_agreement", "ece", "distinct_1", "distinct_2"), 0.01)
MARGIN_SHARE = 0.02
TASK = re.compile(r"(task[0-9]+)[_-]")


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
        on_these_rows: the interval that goes with ``p``: of other seeds, on these rows; None where there is none.
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
    on_these_rows: Interval | None
    verdict: Verdict | None
    near_best: bool
    wins: int
    seconds: float


@dataclass(frozen=True)
class Table:
    """One measure of one set under one protocol.

    Attributes:
        set: of rows; ``held out`` for losses of the data's text, ``own text`` for those of the student's.
        measure: a key of ``OF_ANSWERS`` or ``OF_RUNS``.
        label: of the measure, for people.
        protocol: fingerprint of how answers were made.
        margin: the largest difference that would not matter.
        baseline: name of the kind that the others are compared with.
        rows: how many there are; 0 where a run has one number.
        generations: of each run.
        lines: the baseline first, then by mean, the best first.
        winners: by seed, of those that all kinds have, the kind that is best with it; seeds with a tie are left out.
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
    winners: Mapping[int, str]
    detectable: float
    notes: Sequence[str]


def compare(paths: Iterable[Path], baseline: str | None = None, margin: float | None = None) -> list[Table]:
    """Every measure that finished runs have in common, a table each.

    Args:
        paths: run directories; at least two kinds of runs.
        baseline: a run directory, or words of the name of a kind; None: the kind of the first run.
        margin: see ``compare_kinds``.

    Raises:
        UserError: a folder is no run or its files are damaged, twice the same seed of one kind, one kind alone, there is no
            such baseline, nothing can be compared, or the margin is not above 0.
    """
    kinds = read_kinds(paths)
    return compare_kinds(kinds, baseline_of(kinds, baseline), margin)


def compare_kinds(kinds: Sequence[Kind], baseline: Kind, margin: float | None = None) -> list[Table]:
    """The same of kinds that have been read.

    Args:
        kinds: two at least.
        baseline: one of them.
        margin: the largest difference of ROUGE-L, or of a classifier's scores, that would not matter, in points of 100;
            None: 0.5.

    Raises:
        UserError: one kind alone, nothing can be compared, or the margin is not above 0.
    """
    check_margin(margin)
    if len(kinds) < 2:
        raise UserError(ONE_KIND)
    ordered = [baseline, *(kind for kind in kinds if kind is not baseline)]
    margins = {**MARGINS, **dict.fromkeys(IN_POINTS, margin or POINTS)}
    tables: list[Table] = []
    missing: list[str] = []
    for protocol in dict.fromkeys(run.protocol for kind in ordered for run in kind.runs.values()):
        chosen = [_of_protocol(kind, protocol) for kind in ordered]
        if not _enough(chosen):
            continue
        found = list(_tables(chosen, protocol, margins))
        # What cannot be compared is said under what can
        missing = [said for said in found if isinstance(said, str)]
        tables += [replace(one, notes=[*one.notes, *missing]) for one in found if isinstance(one, Table)]
    if not tables:
        why = f": {'; '.join(missing)}" if missing else ""
        raise UserError(
            "compare: no measure is there of the baseline and of another kind under the same protocol and of the same rows, "
            f"so nothing can be compared{why}. Score the runs alike (dts-hf evaluate)"
        )
    return tables


def check_margin(margin: float | None) -> None:
    """Refuse a margin that is none; None: there is a default.

    Raises:
        UserError: it is not above 0.
    """
    if margin is not None and not (margin > 0 and math.isfinite(margin)):
        raise UserError(f"margin: got {margin}, expected a number of points above 0")


def _enough(kinds: Sequence[Kind]) -> bool:
    """Whether the baseline, which comes first, and another kind have runs."""
    return bool(kinds[0].runs) and sum(bool(kind.runs) for kind in kinds) > 1


def _of_protocol(kind: Kind, protocol: str) -> Kind:
    return kind.those(lambda run: "" if run.protocol == protocol else "scored under another protocol")


def _tables(kinds: Sequence[Kind], protocol: str, margins: Mapping[str, float]) -> Iterator[Table | str]:
    """The tables of one protocol; a sentence for each that nothing remains of."""
    runs = kinds[0].runs.values()
    of_rows = [(name, measure) for run in runs for name, measures in run.answers.items() for measure in measures]
    for set_name, measure in dict.fromkeys(of_rows):
        scored = [kind.those(lambda run: _lacks(measure, set_name, run.answers)) for kind in kinds]  # noqa: B023
        if _enough(scored):
            yield _table_of_rows(scored, set_name, measure, protocol, margins.get(measure))
    of_runs = [(name, measure) for run in runs for name, numbers in run.numbers.items() for measure in numbers]
    for set_name, measure in dict.fromkeys(of_runs):
        scored = [kind.those(lambda run: _lacks(measure, set_name, run.numbers)) for kind in kinds]  # noqa: B023
        if set_name == OWN_TEXT and _enough(scored):
            asked = next(iter(scored[0].runs.values())).own_text
            scored = [kind.those(lambda run: _asked_in_another_way(run, asked)) for kind in scored]  # noqa: B023
        if _enough(scored):
            yield _table_of_numbers(scored, set_name, measure, protocol, margins.get(measure))


def _lacks(measure: str, set_name: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    return "" if measure in scores.get(set_name, {}) else "not scored for this measure"


def _asked_in_another_way(run: Run, asked: str) -> str:
    return "" if run.own_text == asked else "asked for its own text in another way"


def _in_all(answered: Sequence[Set[tuple[str, int]]]) -> tuple[Set[tuple[str, int]], int]:
    """The answers to rows that have all their answers in every run, and how many rows are left out."""
    generations = {seed for of_run in answered for _, seed in of_run}
    counts = Counter(row for row, _ in set.intersection(*map(set, answered)))
    whole = {row for row, count in counts.items() if count == len(generations)}
    left_out = len({row for of_run in answered for row, _ in of_run}) - len(whole)
    return {(row, seed) for row in whole for seed in generations}, left_out


def _table_of_rows(
    kinds: Sequence[Kind], set_name: str, measure: str, protocol: str, margin: float | None
) -> Table | str:
    """A measure that every row has; a sentence where the other kinds have answered other rows than the baseline.

    Of one that an answer may lack (``MAY_LACK``) the rows are compared that have it in all runs.
    """
    label, higher = OF_ANSWERS[measure]

    def answered(run: Run) -> Set[tuple[str, int]]:
        return run.answers[set_name][measure].keys()

    # Those that most runs of the baseline have: one run without its last rows does not take them from all others
    counted = Counter(frozenset(answered(run)) for run in kinds[0].runs.values())
    most = max(counted, key=lambda keys: (counted[keys], len(keys)))
    wanted: Set[tuple[str, int]] = most
    left_out = 0
    if measure in MAY_LACK:
        wanted, left_out = _in_all([answered(run) for kind in kinds for run in kind.runs.values()])
        if not wanted:
            return f"{label} of {set_name} is not compared: no row has it in all runs"
    scored = [kind.those(lambda run: rows_lacking(wanted, answered(run))) for kind in kinds]
    if not _enough(scored):
        of_others = [f"{run.path.name} {why}" for kind in scored for run, why in kind.absent if "lacks" in why]
        return f"{label} of {set_name} is not compared: {'; '.join(of_others)}; expected answers to the same rows"
    runs = [run for kind in scored for run in kind.runs.values()]
    more = [run.path.name for run in runs if len(answered(run)) > len(wanted) and measure not in MAY_LACK]
    rows = sorted({row for row, _ in wanted})
    generations = sorted({seed for _, seed in wanted})
    scores = {kind.name: _scores(kind, set_name, measure, rows, generations) for kind in scored}
    means = {name: table.mean((1, 2)) for name, table in scores.items() if len(table)}
    spreads = {name: components(table) for name, table in scores.items() if len(table)}
    tasks = task_numbers(rows)
    margin = margin or _share_of(means[kinds[0].name])
    lines, notes, seen = _lines(scored, means, spreads, scores, margin, higher, tasks)
    if left_out:
        notes.append(f"{left_out} rows are left out: in some run the answer is too short to have this measure")
    if more:
        notes.append(f"compared are the answers that the baseline has; others have more ({_some(more)})")
    if tasks is not None:
        notes.append(f"rows of a task vary together: intervals are over {max(tasks) + 1} tasks")
    return Table(
        set_name, measure, label, protocol, margin, kinds[0].name, len(rows), len(generations), lines,
        winners(scored, means, higher), seen, notes,
    )  # fmt: skip


def rows_lacking(wanted: Set[tuple[str, int]], answered: Set[tuple[str, int]]) -> str:
    """Which of the rows (and generation seeds) that are compared a run has no answers to, as the end of a sentence."""
    lacking = sorted({row for row, _ in wanted - answered})
    rows = len({row for row, _ in wanted})
    return f"lacks answers to {len(lacking):,} of {rows:,} rows ({_some(lacking)})" if lacking else ""


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _scores(kind: Kind, set_name: str, measure: str, rows: Sequence[str], generations: Sequence[int]) -> Numbers:
    """``[S, G, E]``, seeds in order."""
    tables = [kind.runs[seed].answers[set_name][measure] for seed in sorted(kind.runs)]
    values = [[[table[row, seed] for row in rows] for seed in generations] for table in tables]
    return np.asarray(values, dtype=np.float64).reshape(len(tables), len(generations), len(rows))


def _table_of_numbers(
    kinds: Sequence[Kind], set_name: str, measure: str, protocol: str, margin: float | None
) -> Table:
    """A measure of which a run has one number; its rows are what they are."""
    label, higher = OF_RUNS[measure]
    means = {
        kind.name: np.asarray([kind.runs[seed].numbers[set_name][measure] for seed in sorted(kind.runs)])
        for kind in kinds
        if kind.runs
    }
    margin = margin or _share_of(means[kinds[0].name])
    lines, notes, seen = _lines(kinds, means, {}, {}, margin, higher)
    won = winners(kinds, means, higher)
    return Table(set_name, measure, label, protocol, margin, kinds[0].name, 0, 1, lines, won, seen, notes)


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
    wins = Counter(winners(kinds, means, higher).values())
    lines = []
    for kind in kinds:
        values = means.get(kind.name, np.asarray([]))
        mean = float(values.mean()) if len(values) else math.nan
        difference = p = said = rows = None
        if kind is not base and len(values):
            difference = mean - float(means[base.name].mean())
            if family is not None:
                rows, p = family.comparisons[kind.name]
                rows = rows if scores else None  # else the interval of the verdict is one already
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
                float(values.std(ddof=1)) if len(values) > 1 else math.nan, difference, p, rows, said,
                bool(len(values)) and higher is not None and best - mean * sign <= margin, wins[kind.name],
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


def winners(kinds: Sequence[Kind], means: Mapping[str, Numbers], higher: bool | None) -> dict[int, str]:
    """By seed, of those that all kinds have, the kind that is best with it; without seeds of which several are.

    Args:
        kinds: those without runs do not count.
        means: of each run, by the name of the kind, in the order of its seeds.
        higher: more is better; None: neither more nor less is, and nothing is best.
    """
    if higher is None:
        return {}
    there = [kind for kind in kinds if kind.runs]
    found: dict[int, str] = {}
    for seed in sorted(set.intersection(*(set(kind.runs) for kind in there))):
        of_seed = {kind.name: float(means[kind.name][sorted(kind.runs).index(seed)]) for kind in there}
        best = (max if higher else min)(of_seed.values())
        first, *others = [name for name, value in of_seed.items() if value == best]
        if not others:
            found[seed] = first
    return found


def _notes(kinds: Sequence[Kind], family: Family | None, means: Mapping[str, Numbers]) -> list[str]:
    notes = [
        f"{kind.name}: {len(kind.failed)} of {len(kind.failed) + len(kind.runs)} runs have no scores "
        f"({'; '.join(f'{run.path.name}: {run.failed}' for run in kind.failed)}); they are in no mean"
        for kind in kinds
        if kind.failed
    ]
    notes += [
        f"{kind.name}: {len(kind.absent)} of {len(kind.absent) + len(kind.runs)} runs with scores are not in this table "
        f"({'; '.join(f'{run.path.name}: {why}' for run, why in kind.absent)})"
        for kind in kinds
        if kind.absent
    ]
    if len({tuple(sorted(kind.runs)) for kind in kinds if kind.runs}) > 1:
        notes.append("the kinds have other seeds, so runs are not paired by seed and intervals are wider")
    if any(len(values) < 2 for values in means.values()):
        notes.append("a kind with one seed has no interval: one training seed says nothing about another")
    if family is not None and family.unequal > MOST_UNEQUAL:
        how = (
            "is nothing for one kind"
            if math.isinf(family.unequal)
            else f"differs {family.unequal:.1f} times between kinds"
        )
        notes.append(f"the spread between seeds {how}, so pooling it is doubtful")
    return notes
