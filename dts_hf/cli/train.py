"""``dts-hf train``: a recipe becomes a run directory."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from dts_hf.cli.printing import AsJson, Overrides, RecipeFile, is_main_process, print_json, table_console
from dts_hf.console import printable, show
from dts_hf.errors import UploadError, UserError

if TYPE_CHECKING:
    from dts_hf.doctor.dry_run import DryRun
    from dts_hf.runs.directory import RunDirectory

EPILOG = "Example: [bold]dts-hf train recipes/quickstart.yaml training.learning_rate=1e-4 --output runs/mine[/bold]"


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Run directory; the same as output.dir=DIR.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in that folder.")] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the killed or interrupted run in that folder, if there is one."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the recipe, print the plan and the effective recipe; write nothing."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Distil: recipe in, run directory out (student, scores, figures, report, model card)."""
    from dts_hf.recipe.loading import load_recipe

    if overwrite and resume:
        raise UserError("--overwrite starts again and --resume goes on: give one of them")
    changes = list(overrides or [])
    if output is not None:
        changes.append(f"output.dir={json.dumps(output)}")
    if overwrite:
        changes.append("output.overwrite=true")
    checked = load_recipe(recipe, changes)
    if dry_run:
        from dts_hf.doctor.dry_run import dry_run as make_plan

        print_plan(make_plan(checked), as_json)
        return
    from dts_hf.distill import distill  # after the recipe is checked: a wrong one must not wait for torch
    from dts_hf.runs.directory import RunDirectory

    not_uploaded: UploadError | None = None
    try:
        run = distill(checked, resume=resume)
    except UploadError as error:
        if not isinstance(error.result, RunDirectory):
            raise
        run, not_uploaded = error.result, error
    if is_main_process():
        if as_json:
            print_json(run.read_metrics())
        else:
            print_end_of_run(run)
    if not_uploaded is not None:
        raise not_uploaded


def print_plan(found: DryRun, as_json: bool) -> None:
    """Print the plan of a dry run, and the effective recipe below it."""
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    for name, text in found.plan.items():
        show(f"{name + ':':<10} {printable(text)}")
    show("\n# The effective recipe, every default written out\n")
    for line in found.recipe.splitlines():
        show(printable(line))


def print_end_of_run(run: RunDirectory) -> None:
    """Print the scores of ``run``, and where report, model card and student are."""
    from dts_hf.reporting.tables import summary_table

    table_console().print(summary_table(run))
    for label, path in (("report", run.report_path), ("card", run.card_path), ("student", run.final_path)):
        if path.exists():
            show(f"{label}: {path}")
