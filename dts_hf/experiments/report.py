"""``report.html`` of a comparison: one page that needs nothing but itself, to be read, sorted and mailed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dts_hf.experiments.compare import Line, Table
from dts_hf.experiments.kinds import Kind
from dts_hf.experiments.runs import OF_ANSWERS, OF_RUNS
from dts_hf.experiments.tables import cells, footnotes, sort_keys, title, used_columns
from dts_hf.experiments.trajectories import DASHES, MOST_KINDS, bands, draw_trajectories, style_of
from dts_hf.reporting.canvas import DARK, LIGHT
from dts_hf.reporting.facts import publishable, without_folders
from dts_hf.reporting.html import Sample, data_uri, first_answers, side_by_side
from dts_hf.reporting.model_card import rendered
from dts_hf.runs.directory import RunDirectory

SAMPLES = 6
#: What a phone shows first of a table.
LEADING = ("kind", "verdict", "difference", "interval")
#: The dashes of matplotlib's lines as those of SVG.
SVG_DASHES = dict(zip(DASHES, ("", "7 4", "8 3 2 3", "2 3"), strict=True))


class Forest(NamedTuple):
    """The differences of a table on one axis; places on it in thousandths of its width.

    Attributes:
        rows: of kinds with a difference.
        zero: place of no difference.
        margin: places of both ends of the band in which a difference would not matter.
        ticks: places and their numbers.
    """

    rows: Sequence[ForestRow]
    zero: float
    margin: tuple[float, float]
    ticks: Sequence[tuple[float, str]]


class ForestRow(NamedTuple):
    """One kind.

    Attributes:
        kind: its name.
        word: of its verdict; empty without one.
        place: of the difference.
        interval: places of the ends of the verdict's interval; None without one.
        on_these_rows: the same of other seeds on these rows.
        said: all of it in words.
    """

    kind: str
    word: str
    place: float
    interval: tuple[float, float] | None
    on_these_rows: tuple[float, float] | None
    said: str


def render_page(kinds: Sequence[Kind], tables: Sequence[Table]) -> str:
    """The whole page. Every text of a model, of the data or of a folder is escaped; nothing is fetched.

    Args:
        kinds: that were compared.
        tables: of ``compare_kinds``.
    """
    by_name = {kind.name: kind for kind in kinds}
    ranked = [by_name[line.kind] for line in tables[0].lines]
    scored = [kind for kind in ranked if kind.runs]
    shown = scored[:MOST_KINDS]
    found = bands(shown)
    samples, answering = choose_samples(shown)
    return rendered(
        "comparison.html.jinja",
        autoescape=True,
        baseline=_public(tables[0].baseline),
        counts=(len(kinds), sum(len(kind.runs) for kind in kinds)),
        tables=[_section(table) for table in tables],
        figures=[
            (light, data_uri(light.png()), data_uri(dark.png()))
            for light, dark in zip(
                draw_trajectories(shown, found, LIGHT), draw_trajectories(shown, found, DARK), strict=True
            )
        ],
        themes=[[theme.blue, theme.orange, theme.green, theme.purple] for theme in (LIGHT, DARK)],
        legend=[
            (colour, SVG_DASHES[dash], _public(kind.name))
            for kind, (colour, dash) in zip(shown, map(style_of, range(len(shown))), strict=True)
        ],
        not_drawn=[_public(kind.name) for kind in scored[MOST_KINDS:]],
        samples=samples,
        answering=[_public(name) for name in answering],
        failed=[(_public(kind.name), run.path.name, _public(run.failed)) for kind in kinds for run in kind.failed],
        kinds=[_runs_of(kind) for kind in ranked],
        protocols=_protocols(scored),
    )


def choose_samples(kinds: Sequence[Kind], count: int = SAMPLES) -> tuple[list[Sample], list[str]]:
    """Prompts spread evenly over the scores of the first kind, what the first run of each kind answered, and those kinds.

    Kinds that answered under another protocol are left out: their prompts may be worded otherwise.
    """
    answers = {}
    for kind in kinds:
        run = kind.first
        if (
            run is None
            or run.protocol != (kinds[0].first or run).protocol
            or not any("rougeL" in of for of in run.answers.values())
        ):
            continue
        answers[_public(kind.name)] = first_answers(RunDirectory(run.path).read_predictions("student"))
    lead = _public(kinds[0].name) if kinds else ""
    samples = side_by_side(answers, lead, count)
    return samples, list(answers) if samples else []


def forest(table: Table) -> Forest | None:
    """Where each difference of a table lies; None where it has none."""
    lines = [line for line in table.lines if line.difference is not None]
    if not lines:
        return None
    ends = [-table.margin, table.margin, *(end for line in lines for end in _ends(line))]
    air = 0.04 * (max(ends) - min(ends))
    low, high = min(ends) - air, max(ends) + air

    def place(value: float) -> float:
        return round(1000 * (value - low) / (high - low), 1)

    from matplotlib.ticker import MaxNLocator

    ticks = [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    rows = []
    for line in lines:
        said = cells(table, line)
        interval, rows_interval = line.verdict.interval if line.verdict else None, line.on_these_rows
        words = f"{said['difference']}" + (f", interval {said['interval']}, {said['verdict']}" if line.verdict else "")
        rows.append(
            ForestRow(
                _public(line.kind), line.verdict.word if line.verdict else "", place(line.difference or 0.0),
                (place(interval.low), place(interval.high)) if interval else None,
                (place(rows_interval.low), place(rows_interval.high)) if rows_interval else None,
                f"{_public(line.kind)}: {words}",
            )
        )  # fmt: skip
    return Forest(
        rows, place(0), (place(-table.margin), place(table.margin)), [(place(tick), f"{tick:g}") for tick in ticks]
    )


def _ends(line: Line) -> list[float]:
    found = [line.difference or 0.0, *(line.verdict.interval if line.verdict else ()), *(line.on_these_rows or ())]
    return [end for end in found if math.isfinite(end)]


def _section(table: Table) -> Mapping[str, Any]:
    rows = [cells(table, line) for line in table.lines]
    used = used_columns(rows)
    return {
        "title": _public(title(table)),
        "label": table.label,
        "higher": {**OF_RUNS, **OF_ANSWERS}[table.measure][1],
        "margin": f"{table.margin:g}",
        "columns": [*LEADING, *(column for column in used if column not in LEADING)],
        "rows": [
            (
                {column: _public(text) for column, text in row.items()}, sort_keys(line),
                line.verdict.word if line.verdict else "", line.kind == table.baseline,
            )
            for row, line in zip(rows, table.lines, strict=True)
        ],
        "forest": forest(table),
        "notes": [_public(note) for note in footnotes(table)],
    }  # fmt: skip


def _runs_of(kind: Kind) -> tuple[str, list[str]]:
    runs = [f"{kind.runs[seed].path.name} (seed {seed})" for seed in sorted(kind.runs)]
    return _public(kind.name), [*runs, *(f"{run.path.name} (seed {run.seed}, failed)" for run in kind.failed)]


def _protocols(kinds: Sequence[Kind]) -> list[tuple[str, Mapping[str, Any]]]:
    first = {run.protocol: run for kind in reversed(kinds) for run in kind.runs.values() if run.protocol}
    found: list[tuple[str, Mapping[str, Any]]] = []
    for fingerprint, run in first.items():
        values = publishable(RunDirectory(run.path).read_metrics().get("protocol") or {})
        found.append((fingerprint, {key: value for key, value in values.items() if key != "fingerprint"}))
    return found


def _public(text: str) -> str:
    """Without the folders of this machine: a page is mailed."""
    return without_folders(text)
