"""The command line: each command reads its arguments, calls one function and prints what it returns.

Wrong input (``UserError``) is one message on stderr and exit status 2. Heavy modules are imported inside the commands,
so that ``--help`` is fast. Of several processes (``accelerate launch``, ``torchrun``) only the first one prints.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dts_hf.errors import UserError

if TYPE_CHECKING:
    from dts_hf.run_directory import RunDirectory

IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"


class CommandGroup(TyperGroup):
    """Turns the two ways in which a person ends a command into a message and an exit status."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)  # type: ignore[arg-type]
        except UserError as error:
            if IS_MAIN_PROCESS:
                typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=CommandGroup,
    help="Distil large language models into small ones; the softmax temperature follows training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"dts-hf {version('dts-hf')}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


@app.command(
    epilog="Example: [bold]dts-hf train recipes/quickstart.yaml training.learning_rate=1e-4 --output runs/mine[/bold]"
)
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, such as loss.kd_ratio=0.7.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Run directory; the same as output.dir=DIR.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in that folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Distil: recipe in, run directory out (student, scores, figures, report, model card)."""
    from dts_hf.recipe import load_recipe

    changes = list(overrides or [])
    if output is not None:
        changes.append(f"output.dir={json.dumps(output)}")
    if overwrite:
        changes.append("output.overwrite=true")
    checked = load_recipe(recipe, changes)
    from dts_hf.distill import distill

    run = distill(checked)
    if IS_MAIN_PROCESS and as_json:
        _print_json(run.read_metrics())
    elif IS_MAIN_PROCESS:
        _print_end_of_run(run)


@app.command(
    epilog="Example: [bold]dts-hf evaluate runs/quickstart --data recipes/data/quickstart_validation.jsonl[/bold]"
)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="Hub name, folder, or run directory (its student).")
    ],
    data: Annotated[
        str | None, typer.Option(help="Rows to answer: file, folder, pattern or Hub data set; default: the run's.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Prompt template; default: the run's, else alpaca.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Answer the first so many rows; default: all.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; default: the run's, else 128.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 32,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(min=0, help="Forbid repeated n-grams, 0: allow; default: the run's, else 0.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Sample with this seed; repeat for several passes.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Also write the answers to this JSONL file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer held-out prompts with a model, and score the answers (ROUGE-L, exact match, repetition)."""
    from dts_hf.distill import evaluate_command

    scores = evaluate_command(
        model,
        data,
        template=template,
        rows=rows,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        no_repeat_ngram_size=no_repeat_ngram_size,
        seeds=seed or None,
        predictions=predictions,
    )
    _print_scores(f"{model} on {data}" if data else model, scores, as_json)


@app.command(
    epilog='Example: [bold]dts-hf score answers.jsonl[/bold], rows of {"prediction": ..., "references": [...]}'
)
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL of predictions with their references.")],
    as_json: AsJson = False,
) -> None:
    """Score answers that are already written, without any model."""
    from dts_hf.evaluation.score import score_file

    _print_scores(str(file), score_file(file), as_json)


@app.command(epilog="Example: [bold]dts-hf report runs/quickstart[/bold]")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]) -> None:
    """Write figures, report.html and the model card again from a run directory."""
    from dts_hf.reporting.report import write_report
    from dts_hf.run_directory import RunDirectory

    typer.echo(write_report(RunDirectory.open(run)))


class Listed(str, Enum):
    """What ``list`` can show."""

    temperatures = "temperatures"
    divergences = "divergences"
    templates = "templates"
    recipes = "recipes"


@app.command("list", epilog="Example: [bold]dts-hf list temperatures[/bold]")
def list_choices(
    what: Annotated[
        Listed | None,
        typer.Argument(metavar="KIND", help="temperatures, divergences, templates or recipes; default: all of them."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the names that a recipe can use, with their options."""
    lists = {kind.value: _choices(kind) for kind in ([what] if what else Listed)}
    if as_json:
        _print_json(lists)
        return
    for kind, rows in lists.items():
        _print_table(kind, rows)


@app.command(epilog="Example: [bold]dts-hf schema > recipe.schema.json[/bold]")
def schema() -> None:
    """Print the JSON schema of a recipe, for the completion and checks of an editor."""
    from dts_hf.recipe import editor_schema

    _print_json(editor_schema())


# ------------------------------------------------------------------------------------------------------------ printing


def _choices(kind: Listed) -> list[dict[str, str]]:
    if kind is Listed.temperatures:
        from dts_hf.temperature import temperature_policies

        return [_class_row(name, policy) for name, policy in temperature_policies().items()]
    if kind is Listed.divergences:
        from dts_hf.divergences import DIVERGENCES

        return [_class_row(name, divergence) for name, divergence in DIVERGENCES.items()]
    if kind is Listed.templates:
        from dts_hf.prompts import TEMPLATES

        return [{"name": name, "about": template.description} for name, template in TEMPLATES.items()]
    from dts_hf.recipe import find_recipes

    return [{"name": str(path), "about": comment} for path, comment in find_recipes("recipes").items()]


def _class_row(name: str, kind: type) -> dict[str, str]:
    options = ", ".join(str(option) for option in inspect.signature(kind).parameters.values())
    about = (inspect.getdoc(kind) or "").partition("\n")[0]
    return {"name": name, "options": re.sub(r": [^=,]+ = ", "=", options), "about": about}


def _print_json(values: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(values, indent=2, ensure_ascii=False, default=str))


def _print_end_of_run(run: RunDirectory) -> None:
    from rich.console import Console

    from dts_hf.reporting.tables import summary_table

    Console().print(summary_table(run))
    for label, path in (("report", run.report_path), ("card", run.card_path), ("student", run.final_path)):
        if path.exists():
            typer.echo(f"{label}: {path}")


def _print_scores(title: str, scores: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(scores)
        return
    rows = [{"score": key, "value": _number(value)} for key, value in scores.items() if _number(value)]
    _print_table(title, rows)


def _number(value: Any) -> str:
    """A score in words; an empty string for what belongs only into the JSON."""
    if isinstance(value, Mapping) and "mean" in value:
        spread = f" ± {value['sd']:.4f}" if value.get("sd") else ""
        return f"{value['mean']:.4f}{spread}"
    if isinstance(value, float):
        return f"{value:.4f}"
    return str(value) if isinstance(value, (int, str)) else ""


def _print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ["none found"]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.values()))
    Console().print(table)
