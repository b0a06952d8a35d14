"""Comparisons as Markdown, CSV and plain cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

from dts_hf.experiments.compare import Line, Table
from dts_hf.experiments.intervals import Interval
from dts_hf.experiments.runs import HELD_OUT
from dts_hf.experiments.verdicts import Word, digits_of

COLUMNS = (
    "kind", "seeds", "mean", "sd: seeds", "sd: generations", "sd: rows", "difference", "interval", "on these rows", "p",
    "verdict", "near best", "best with", "seconds",
)  # fmt: skip


#: The words of verdicts as a table sorts them.
BEST_FIRST: tuple[Word, ...] = ("better", "higher", "equivalent", "undecided", "lower", "worse")
#: What a terminal has room for.
SHOWN = ("kind", "seeds", "mean", "difference", "interval", "verdict")


def title(table: Table) -> str:
    """What the table is of, in a line."""
    rows = f", {table.rows:,} rows" if table.rows else ""
    generations = f", {table.generations} generations each" if table.generations > 1 else ""
    of_set = "" if table.set == HELD_OUT else f", {table.set}"
    return f"{table.label}{of_set}{rows}{generations} (baseline: {table.baseline})"


def cells(table: Table, line: Line) -> dict[str, str]:
    """One line for people, by column."""
    digits = digits_of(table.margin)
    spread = line.spread
    seeds = f"{line.seeds}" + (f" (+{line.failed} failed)" if line.failed else "")
    return dict(
        zip(
            COLUMNS,
            (
                line.kind, seeds, _number(line.mean, digits),
                _number(spread.train if spread else line.run_sd, digits + 1) if line.seeds > 1 else "",
                _number(spread.generation, 1) if spread and table.generations > 1 else "",
                _number(spread.example, 1) if spread else "",
                _signed(line.difference, digits),
                _range(line.verdict.interval if line.verdict else None, digits), _range(line.on_these_rows, digits),
                "" if line.p is None else f"{line.p:.3f}" if line.p >= 0.0005 else "< 0.001",
                line.verdict.sentence if line.verdict else "" if line.kind == table.baseline else "no verdict",
                "yes" if line.near_best else "", f"{line.wins}" if line.wins else "", _number(line.seconds, 0),
            ),
            strict=True,
        )
    )  # fmt: skip


def sort_keys(line: Line) -> dict[str, str]:
    """What each cell of a line is sorted by where a page sorts: a number but of ``kind``, empty where there is nothing."""
    spread, said, rows = line.spread, line.verdict, line.on_these_rows
    numbers = (
        float(line.seeds), line.mean, spread.train if spread else line.run_sd, spread.generation if spread else None,
        spread.example if spread else None, line.difference, said.interval.low if said else None,
        rows.low if rows else None, line.p, float(BEST_FIRST.index(said.word)) if said else None,
        float(line.near_best), float(line.wins), line.seconds,
    )  # fmt: skip
    texts = ("" if value is None or math.isnan(value) else repr(float(value)) for value in numbers)
    return dict(zip(COLUMNS, (line.kind, *texts), strict=True))


def used_columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The columns in which a row has something."""
    return [column for column in COLUMNS if any(row[column] for row in rows)]


def footnotes(table: Table) -> list[str]:
    """What a reader of the table has to know."""
    intervals = (
        "Intervals: 95 % for all kinds together, over seeds and rows that might have been others"
        if table.rows
        else "Intervals: 95 % for all kinds together, over seeds, on these rows"
    )
    reach = f"{table.detectable:.{digits_of(table.margin)}f}"
    seen = (
        ""
        if math.isnan(table.detectable)
        else f"; on these rows 4 of 5 such studies would see a difference of {reach}"
    )
    margin = f"equivalent and near best: within {table.margin:.{digits_of(table.margin) + 1}g}"
    protocol = f", protocol {table.protocol}" if table.protocol else ""
    best = [f"Best with each seed: {by_seed}."] if (by_seed := _by_seed(table)) else []
    notes = [f"{note[0].upper()}{note[1:]}." for note in table.notes]
    return [f"{intervals}; {margin}{seen}{protocol}.", *best, *notes]


def _by_seed(table: Table) -> str:
    """``temperature.value=2 with 1, 2; temperature.value=4 with 3``, of tables with several seeds."""
    of_kind = {
        name: [str(seed) for seed, best in table.winners.items() if best == name] for name in table.winners.values()
    }
    return (
        "; ".join(f"{name} with {', '.join(seeds)}" for name, seeds in of_kind.items())
        if len(table.winners) > 1
        else ""
    )


def markdown(tables: Sequence[Table]) -> str:
    """All tables, with their footnotes."""
    parts = []
    for table in tables:
        rows = [cells(table, line) for line in table.lines]
        used = used_columns(rows)
        parts += [f"### {title(table)}", ""]
        parts.append(f"| {' | '.join(used)} |")
        parts.append(f"|{'|'.join('---' if column in ('kind', 'verdict') else '---:' for column in used)}|")
        parts += [f"| {' | '.join(row[column].replace('|', chr(92) + '|') for column in used)} |" for row in rows]
        parts += ["", *footnotes(table), ""]
    return "\n".join(parts)


def as_csv(tables: Sequence[Table]) -> str:
    """All lines of all tables with full precision, for another program."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([
        "set", "measure", "protocol", "kind", "baseline", "seeds", "failed", "mean", "run_sd", "sd_train",
        "sd_generation", "sd_example", "difference", "low", "high", "low_on_these_rows", "high_on_these_rows", "p",
        "verdict", "sentence", "near_best", "wins",
        "seconds", "rows", "generations", "margin",
    ])  # fmt: skip
    for table in tables:
        for line in table.lines:
            spread, said = line.spread, line.verdict
            values = (
                line.mean, line.run_sd, *((spread.train, spread.generation, spread.example) if spread else (None,) * 3),
                line.difference, *(said.interval if said else (None, None)), *(line.on_these_rows or (None, None)), line.p,
            )  # fmt: skip
            writer.writerow([
                table.set, table.measure, table.protocol, line.kind, table.baseline, line.seeds, line.failed,
                *("" if value is None or math.isnan(value) else repr(float(value)) for value in values),
                *((said.word, said.sentence) if said else ("", "")),
                int(line.near_best), line.wins, "" if math.isnan(line.seconds) else line.seconds, table.rows,
                table.generations, table.margin,
            ])  # fmt: skip
    return text.getvalue()


def as_json(tables: Sequence[Table]) -> list[dict[str, object]]:
    """The lines of ``as_csv`` as mappings."""
    return [dict(row) for row in csv.DictReader(io.StringIO(as_csv(tables)))]


def _range(interval: Interval | None, digits: int) -> str:
    return " to ".join(_signed(end, digits) for end in interval or ())


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:+.{digits}f}"
