"""What the commands share: JSON and tables on stdout, and which process prints them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dts_hf.console import printable

WIDEST = 10_000  # columns of a table in a pipe
#: Arguments that several commands take.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, such as loss.kd_ratio=0.7.")
]


def is_main_process() -> bool:
    """Whether this process prints results: of several (``accelerate launch``, ``torchrun``) the first one does."""
    return os.environ.get("RANK", "0") == "0"


def print_json(values: Mapping[str, Any]) -> None:
    """Print indented JSON."""
    typer.echo(json.dumps(values, indent=2, ensure_ascii=False, default=str))


def print_answer(answer: Mapping[str, Any], alone: bool) -> None:
    """Print the answer to a prompt, below the prompt unless it is the only one."""
    if not alone:
        typer.echo(f"> {printable(answer['prompt'])}")
    typer.echo(printable(answer["prediction"]) + ("" if alone else "\n"))


def print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print ``rows`` under the column names of the first one; what the user's files hold cannot act on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=printable(title), title_justify="left")
    for column in rows[0] if rows else ["none found"]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row.values()))
    # A pipe has no width: rich would take it for a terminal of 80 columns and cut or fold what another program reads.
    Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDEST).print(table)
