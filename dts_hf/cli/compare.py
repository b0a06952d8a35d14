"""``dts-hf compare``: finished runs of several kinds side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dts_hf.cli.printing import AsJson, print_json, print_table
from dts_hf.console import show

EPILOG = "Example: [bold]dts-hf compare runs/*/ --baseline runs/constant-1 --output comparison[/bold]"


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories of two kinds or more.")],
    baseline: Annotated[
        str | None,
        typer.Option(help="A run directory, or words of a kind's name; default: the kind of the first run."),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            help="Largest difference in ROUGE-L that would not matter, in points; default: 0.5. Set it before."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.html, comparison.md and comparison.csv.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs that differ in more than their seed: means, intervals, and what can be said of each difference."""
    from dts_hf.experiments import tables as written
    from dts_hf.experiments.compare import compare_kinds
    from dts_hf.experiments.kinds import baseline_of, read_kinds
    from dts_hf.experiments.report import render_page
    from dts_hf.files import write_text_atomic

    kinds = read_kinds(runs)
    tables = compare_kinds(kinds, baseline_of(kinds, baseline), margin)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_text_atomic(output / "report.html", render_page(kinds, tables))
        write_text_atomic(output / "comparison.md", written.markdown(tables))
        write_text_atomic(output / "comparison.csv", written.as_csv(tables))
    if as_json:
        print_json({"lines": written.as_json(tables)})
        return
    for table in tables:
        rows = [written.cells(table, line) for line in table.lines]
        print_table(written.title(table), [{column: row[column] for column in written.SHOWN} for row in rows])
        for note in written.footnotes(table):
            show(note)
        show("")
    if output is not None:
        show(output / "report.html")
