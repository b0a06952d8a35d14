"""What the commands share: JSON and tables on stdout, and which process prints them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dts_hf.console import harmless_json, printable, show
from dts_hf.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 10_000  # columns of a table in a pipe


def complete_recipe(incomplete: str) -> list[str]:
    """Recipe files and folders below what was typed, and the names of shipped recipes."""
    from dts_hf.recipe.shipped import shipped_recipes

    folder, _, start = incomplete.rpartition("/")
    inside = Path(folder or ("/" if incomplete.startswith("/") else "."))
    prefix = f"{folder}/" if incomplete.count("/") else ""
    found = sorted(path for path in inside.glob(f"{start}*") if not path.name.startswith((".", "_")))
    files = [
        f"{prefix}{path.name}{'/' if path.is_dir() else ''}"
        for path in found
        if path.is_dir() or path.suffix == ".yaml"
    ]
    return [*files, *(name for name in shipped_recipes() if name.startswith(incomplete))]


def complete_override(incomplete: str) -> list[str]:
    """Keys of a recipe, and the values of those that have a choice."""
    from dts_hf.recipe.completion import completions

    return completions(incomplete)


#: Arguments that several commands take.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", autocompletion=complete_recipe, help="Recipe file (YAML).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes, such as loss.kd_ratio=0.7.", autocompletion=complete_override),
]


def whole_numbers(text: str | None, option: str) -> list[int]:
    """``1,2,3`` as numbers; none where nothing is given.

    Raises:
        UserError: it is something else.
    """
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"{option}: got {text!r}, expected whole numbers, for example 1,2,3") from None


def is_main_process() -> bool:
    """Whether this process prints results: of several (``accelerate launch``, ``torchrun``) the first one does."""
    return os.environ.get("RANK", "0") == "0"


def print_json(values: Mapping[str, Any]) -> None:
    """Print indented JSON; what could act on the terminal is escaped in it, so that a program reads the same values."""
    print(harmless_json(json.dumps(values, indent=2, ensure_ascii=False, default=str)), flush=True)


def print_answer(answer: Mapping[str, Any], alone: bool) -> None:
    """Print the answer to a prompt, below the prompt unless it is the only one."""
    if not alone:
        show(f"> {printable(answer['prompt'])}")
    show(printable(answer["prediction"]) + ("" if alone else "\n"))


def print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print ``rows`` under the column names of the first one; what the user's files hold cannot act on the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title), style="table.title"), title_justify="left")
    for place, column in enumerate(rows[0] if rows else ["none found"]):
        # What stands first is what the user types next: folded where it has no room, never cut
        table.add_column(column, overflow="fold" if place == 0 else "ellipsis")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row.values()))
    table_console().print(table)


def table_console() -> Console:
    """Stdout for tables. A pipe has no width: rich would fold for 80 columns what another program reads."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDEST)
