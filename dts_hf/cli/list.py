"""``dts-hf list``: the names that a recipe can use."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from dts_hf.cli.printing import AsJson, print_json, print_table
from dts_hf.registry import defaults_of

EPILOG = "Example: [bold]dts-hf list temperatures[/bold]"


#: What ``list`` can show.
Kind = Literal["temperatures", "divergences", "templates", "recipes", "sets", "protocols"]


def command(
    what: Annotated[
        Kind | None,
        typer.Argument(
            metavar="KIND",
            help="temperatures, divergences, templates, recipes, sets or protocols; default: all of them.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the names that a recipe can use, with their options."""
    choices = {kind: list_choices(kind) for kind in ([what] if what else get_args(Kind))}
    if as_json:
        print_json(choices)
    else:
        for kind, rows in choices.items():
            print_table(kind, rows)


def list_choices(kind: Kind) -> list[dict[str, str]]:
    """One row for each name of a kind: ``name``, ``about``, and for classes their ``options``."""
    if kind == "temperatures":
        from dts_hf.temperature import temperature_policies

        return [_class_row(name, policy) for name, policy in temperature_policies().items()]
    if kind == "divergences":
        from dts_hf.divergences import DIVERGENCES

        return [_class_row(name, divergence) for name, divergence in DIVERGENCES.items()]
    if kind == "templates":
        from dts_hf.data.chat_templates import TEMPLATES

        return [{"name": name, "about": template.description} for name, template in TEMPLATES.items()]
    if kind == "protocols":
        from dts_hf.evaluation.protocol import PROTOCOLS

        return [{"name": name, "about": protocol.about} for name, protocol in PROTOCOLS.items()]
    if kind == "sets":
        from dts_hf.evaluation.benchmark_sets import list_sets

        return list_sets()
    from dts_hf.recipe.shipped import find_recipes, shipped_folder, shipped_recipes

    listed = {}
    if Path("recipes").resolve() != shipped_folder():  # your own
        listed = {str(path): comment for path, comment in find_recipes("recipes").items()}
    listed |= {name: comment for name, (_, comment) in shipped_recipes().items()}
    return [{"name": name, "about": comment} for name, comment in listed.items()]


def _class_row(name: str, kind: type) -> dict[str, str]:
    """The options with the values that are in force when none is given; null: nothing is."""
    options = ", ".join(f"{option}={_as_typed(value)}" for option, value in defaults_of(kind).items())
    about = (inspect.getdoc(kind) or "").partition("\n")[0]
    return {"name": name, "options": options, "about": about}


def _as_typed(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
