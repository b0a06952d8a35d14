"""``dts-hf prepare``: the published data sets, made ready to train and score on."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from dts_hf.cli.printing import print_table
from dts_hf.errors import UserError, nearest

EPILOG = "Example: [bold]dts-hf prepare dolly --output data/[/bold]"
#: What stands behind the name belongs to the set: each has options of its own, and a ``--help`` with examples.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
#: The modules of ``dts_hf.data_prep`` that prepare something.
SETS = ("dolly", "self_instruct", "s_ni", "unni", "vicuna", "glue", "quickstart", "recipes")
HELP = ("--help", "-h")


def command(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="SET", help=f"{', '.join(SETS)}; default: list them.", show_default=False)
    ] = None,
) -> None:
    """Prepare a published data set: rows, counts and a manifest below data/; SET --help shows its options."""
    if name is None or name in HELP:
        if name in HELP:
            typer.echo(ctx.get_help())
        print_table("sets", _table())
        return
    plain = _canonical(name)
    if plain not in SETS:
        raise UserError(f"prepare: got '{name}', expected {', '.join(SETS)}.{nearest(plain, SETS)}")
    module = importlib.import_module(f"dts_hf.data_prep.{plain}")
    parser = module.arguments()
    parser.prog = f"dts-hf prepare {plain}"
    module.prepare(parser.parse_args(ctx.args))


def _canonical(name: str) -> str:
    from dts_hf.evaluation.benchmark_sets import canonical_name

    return canonical_name(name) or name.strip().lower().replace("-", "_")


def _table() -> list[dict[str, str]]:
    """Name, what it is, and where it comes from."""
    from dts_hf.data_prep.upstream import UPSTREAM

    rows = []
    for name in SETS:
        doc = (importlib.import_module(f"dts_hf.data_prep.{name}").__doc__ or "").partition("\n")[0]
        rows.append({"name": name, "about": doc, "source": UPSTREAM[name].source if name in UPSTREAM else "shipped"})
    return rows
