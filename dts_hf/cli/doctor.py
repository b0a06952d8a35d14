"""``dts-hf doctor``: examine a recipe before it costs hours."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dts_hf.cli.printing import AsJson, Overrides, RecipeFile, print_json
from dts_hf.errors import ExitCode

EPILOG = "Example: [bold]dts-hf doctor recipes/quickstart.yaml training.learning_rate=1e-4[/bold]"


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices that memory is estimated for; default: those of this machine.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Examine a recipe before it costs hours: data, models, loss, three real steps; exit status 1 on an error."""
    from dts_hf.doctor.run import diagnose

    stderr = sys.stderr  # the doctor keeps what libraries write there to itself

    def show(name: str) -> None:
        if stderr.isatty():
            typer.echo(f"\r\x1b[2Kdoctor: {name} ..." if name else "\r\x1b[2K", nl=False, file=stderr)

    diagnosis = diagnose(recipe, overrides or (), devices=devices, on_check=show)
    show("")
    if as_json:
        print_json(diagnosis.as_dict())
    else:
        from dts_hf.doctor.report import print_screen

        print_screen(diagnosis)
    if diagnosis.status == "error":
        raise typer.Exit(int(ExitCode.FAILED))
