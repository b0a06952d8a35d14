"""``dts-hf advise``: what a sample of rows says of the temperature, and which arms are worth a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dts_hf.cli.printing import AsJson, Overrides, RecipeFile, print_json, print_table
from dts_hf.console import show

EPILOG = "Example: [bold]dts-hf advise recipes/quickstart.yaml --write sweep.yaml --output advice[/bold]"


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Training rows, and as many held-out ones; default: 64, and up to 200 until they have 2,000 labels.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the rows.")] = 0,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the recipe with a sweep section of the arms advised.")
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show every rule: condition, what was measured, source, domain, strength."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for advice.json, curves.csv and advice.html.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure teacher and untrained student on some rows, and say what is worth sweeping; not what will win."""
    from dts_hf.advice import proposal, report
    from dts_hf.advice.advise import advise
    from dts_hf.files import check_output_folder

    if write is not None:
        proposal.check_writable(write)
    if output is not None:
        check_output_folder(output)
    advice = advise(recipe, overrides or (), rows=rows, seed=seed)
    if write is not None:
        proposal.write_sweep(write, advice.recipe, advice.arms, advice.name)
    page = None if output is None else report.write_report(output, advice)
    if as_json:
        print_json(advice.as_dict())
        return
    show(report.title(advice))
    print_table(
        "the teacher by temperature (training rows, but for 'held out')", report.table_by_temperature(advice.found)
    )
    print_table("teacher and untrained student", report.table_at_one(advice.found))
    for line in report.explained(advice) if explain else report.lines(advice):
        show(line)
    print_table("worth a sweep, three seeds each", report.table_of_arms(advice))
    if write is not None:
        show(f"next: dts-hf sweep {write} --dry-run")
    if page is not None:
        show(page)
