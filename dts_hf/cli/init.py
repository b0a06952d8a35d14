"""``dts-hf init``: a first recipe for a teacher and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dts_hf.console import harmless, show

EPILOG = "Example: [bold]dts-hf init --teacher HuggingFaceTB/SmolLM2-360M-Instruct --data my.jsonl[/bold]"


def command(
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Hub name, folder or .gguf file; asked for when left out.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows: file, folder, pattern or Hub data set; asked for when left out.")
    ] = None,
    student: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model that learns; default: half of the teacher.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="How many of the teacher's layers the student has.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The recipe; default: named after the data.")] = None,
    preset: Annotated[
        Literal["standard", "quick"], typer.Option(help="quick makes 20 steps, to see that all works.")
    ] = "standard",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
) -> None:
    """Look at a teacher and data, and write a commented recipe that fits them."""
    from dts_hf.starter.start import asks_on_a_terminal, start

    started = start(
        teacher,
        data,
        student=student,
        layers=layers,
        output=output,
        preset=preset,
        overwrite=overwrite,
        ask=asks_on_a_terminal(lambda question: str(typer.prompt(harmless(question), err=True))),
    )
    show(f"wrote {started.path}: every choice has its reason beside it. Next:")
    for line in started.next_commands:
        show(f"  {line}")
