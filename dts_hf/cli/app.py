"""The command line: each command reads its arguments, calls one function and prints what it returns.

Wrong input (``UserError``) is one message on stderr and exit status 2; ``exit_codes.py`` has the others. Heavy modules
are imported inside the commands, so that ``--help`` is fast. Of several processes (``accelerate launch``, ``torchrun``)
only the first one prints results.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from dts_hf.console import masked, printable
from dts_hf.errors import ExitCode, Interrupted, RunError, UserError
from dts_hf.runs.failures import GO_ON, one_sentence

if TYPE_CHECKING:
    from dts_hf.runs.directory import RunDirectory


IS_MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
#: How much later than another process the first one may find the same wrong input, seconds.
SAME_INPUT_SECONDS = 5.0


class CommandGroup(TyperGroup):
    """Turns the ways in which a command ends early into a message and an exit status; a bug keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)  # type: ignore[arg-type]
        except UserError as error:
            _leave(ExitCode.WRONG_INPUT, "" if _is_said_elsewhere(error) else f"Error{_who()}: {error}")
        except Interrupted as error:
            _leave(ExitCode.INTERRUPTED, f"Stopped: {error}" if IS_MAIN_PROCESS else "")
        except KeyboardInterrupt:
            _leave(ExitCode.CTRL_C, "")
        except Exception as error:
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                raise  # typer's own
            sentence = str(error) if isinstance(error, RunError) else one_sentence(error)
            if sentence is not None:
                if ctx.invoked_subcommand == "train" and GO_ON not in sentence:
                    sentence += f". {GO_ON}"
                _leave(ExitCode.FAILED, "" if _is_said_elsewhere(error) else f"Error{_who()}: {sentence}")
            if not _is_one_of_several():
                raise
            _leave(ExitCode.FAILED, traceback.format_exc())


def _leave(code: ExitCode, message: str) -> NoReturn:
    """Print ``message`` on stderr and end with ``code``."""
    if message:
        typer.echo(masked(message.rstrip()), err=True)
    if _is_one_of_several():
        # The farewell of collective libraries may wait for processes that are gone or still at work.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(int(code)) from None


def _who() -> str:
    return "" if IS_MAIN_PROCESS else f" (process {os.environ.get('RANK')})"


def _is_said_elsewhere(error: Exception) -> bool:
    """Whether another process prints what this one has found."""
    everywhere = getattr(error, "everywhere", False)
    if IS_MAIN_PROCESS or everywhere is not None:
        return not IS_MAIN_PROCESS and bool(everywhere)
    torch = sys.modules.get("torch")
    if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        # Before the processes are joined, those of a machine read the same files: the first one there speaks for them.
        return os.environ.get("LOCAL_RANK", "0") != "0"
    # Most wrong input is found by all: the launcher ends this process here as soon as the first one has said it.
    time.sleep(SAME_INPUT_SECONDS)
    return False


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


app = typer.Typer(
    cls=CommandGroup,
    help="Distil large language models into small ones; the softmax temperature follows training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Dtype(str, Enum):
    """Types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Backend(str, Enum):
    """What generates the answers."""

    dts_hf = "dts_hf"
    vllm = "vllm"


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
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the killed or interrupted run in that folder, if there is one."),
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
    from dts_hf.distill import distill

    run = distill(checked, resume=resume)
    if IS_MAIN_PROCESS and as_json:
        _print_json(run.read_metrics())
    elif IS_MAIN_PROCESS:
        _print_end_of_run(run)


@app.command(epilog="Example: [bold]dts-hf doctor recipes/quickstart.yaml training.learning_rate=1e-4[/bold]")
def doctor(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, such as loss.kd_ratio=0.7.")
    ] = None,
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

    found = diagnose(recipe, overrides or (), devices=devices, on_check=show)
    show("")
    if as_json:
        _print_json(found.as_dict())
    else:
        from dts_hf.doctor.report import print_screen

        print_screen(found)
    if found.status == "error":
        raise typer.Exit(int(ExitCode.FAILED))


@app.command(
    epilog="Example: [bold]dts-hf evaluate runs/first --sets dolly,self_instruct,vicuna --protocol minillm"
    " --output runs/first/benchmark[/bold]"
)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="Hub name, folder, or run directory (its student).")
    ],
    sets: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Prepared sets (dts-hf list sets) or row files.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="More rows: file, folder, pattern or Hub data set; default: the run's validation rows."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="See dts-hf list protocols; default: minillm for prepared sets and models, else the run's."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N", help="Sample once per seed; default: as the protocol says.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Prompt template; default: the protocol's.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; default: the protocol's.")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(min=0, help="Forbid repeated n-grams, 0: allow; default: the protocol's.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Answer the first so many rows of each set.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 32,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Type of the weights; default: as the run answers or trains, for a model float32."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for metrics and predictions; a killed evaluation goes on from there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another evaluation in that folder.")] = False,
    backend: Annotated[Backend, typer.Option(help="What generates; vllm is a protocol of its own.")] = Backend.dts_hf,
    as_json: AsJson = False,
) -> None:
    """Answer held-out prompts with a model, and score the answers (ROUGE-L, exact match, repetition)."""
    from dts_hf.evaluation.evaluate import evaluate_command

    metrics = evaluate_command(
        model,
        _names(sets),
        data=data,
        protocol=protocol,
        seeds=_seeds(seeds),
        template=template,
        max_new_tokens=max_new_tokens,
        no_repeat_ngram_size=no_repeat_ngram_size,
        rows=rows,
        batch_size=batch_size,
        dtype=dtype.value if dtype else None,
        output=output,
        overwrite=overwrite,
        backend=backend.value,
    )
    if IS_MAIN_PROCESS and as_json:
        _print_json(metrics)
    elif IS_MAIN_PROCESS:
        _print_evaluation(metrics)


@app.command(
    epilog='Example: [bold]dts-hf score answers.jsonl[/bold], rows of {"prediction": ..., "references": [...]}'
)
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL of predictions with their references.")],
    as_json: AsJson = False,
) -> None:
    """Score answers that are already written, without any model: each set for itself, means over seeds."""
    from dts_hf.evaluation.score import score_file

    _print_scores(str(file), score_file(file), as_json)


@app.command(epilog="Example: [bold]dts-hf report runs/quickstart[/bold]")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]) -> None:
    """Write figures, report.html and the model card again from a run directory."""
    from dts_hf.reporting.report import write_report
    from dts_hf.runs.directory import RunDirectory

    typer.echo(write_report(RunDirectory.open(run)))


class Listed(str, Enum):
    """What ``list`` can show."""

    temperatures = "temperatures"
    divergences = "divergences"
    templates = "templates"
    recipes = "recipes"
    sets = "sets"
    protocols = "protocols"


@app.command("list", epilog="Example: [bold]dts-hf list temperatures[/bold]")
def list_choices(
    what: Annotated[
        Listed | None,
        typer.Argument(
            metavar="KIND",
            help="temperatures, divergences, templates, recipes, sets or protocols; default: all of them.",
        ),
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
    from dts_hf.recipe.schema import editor_schema

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
        from dts_hf.data.prompt_templates import TEMPLATES

        return [{"name": name, "about": template.description} for name, template in TEMPLATES.items()]
    if kind is Listed.protocols:
        from dts_hf.evaluation.protocol import PROTOCOLS

        return [{"name": name, "about": protocol.about} for name, protocol in PROTOCOLS.items()]
    if kind is Listed.sets:
        from dts_hf.evaluation.benchmark_sets import list_sets

        return list_sets()
    from dts_hf.recipe.loading import find_recipes

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


# Scores that are shares; tables show them x 100, as the literature does
SHARES = ("rougeL", "exact_match", "repeats_4gram", "cut_at_limit", "empty")


def _print_scores(title: str, scores: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(scores)
        return
    if "sets" in scores:
        for name, of_set in scores["sets"].items():
            _print_scores(f"{title}: {name}", of_set, False)
        return
    rows = []
    for key, value in scores.items():
        share = key in SHARES
        shown = f"{100 * value:.4f}" if share else str(value)
        rows.append({"score": f"{key} x 100" if share else key, "value": shown})
    _print_table(title, rows)


def _print_evaluation(metrics: Mapping[str, Any]) -> None:
    """One line for each set: means over seeds, +- the standard deviation over seeds where there is one."""
    (entry,) = metrics["models"].values()
    rows = []
    for name, scores in entry["sets"].items():
        row = {"set": name, "n": str(scores["n"]), "seeds": str(len(scores["seeds"]) or "greedy")}
        for key, label in (("rougeL", "ROUGE-L"), ("exact_match", "exact match")):
            row[label] = _with_spread(scores[key], 100, 2)
        row["tokens"] = _with_spread(scores["mean_tokens"], 1, 1)
        for key, label in (("cut_at_limit", "cut %"), ("empty", "empty %"), ("repeats_4gram", "repeats %")):
            row[label] = _with_spread(scores[key], 100, 1)
        rows.append(row)
    protocol = metrics["protocol"]
    _print_table(f"{metrics['source']}: protocol {protocol['name']} ({protocol['fingerprint']})", rows)


def _with_spread(value: Mapping[str, Any], scale: float, digits: int) -> str:
    spread = f" ± {scale * value['sd']:.{digits}f}" if value.get("sd") is not None else ""
    return f"{scale * value['mean']:.{digits}f}{spread}"


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _seeds(text: str | None) -> list[int] | None:
    try:
        return [int(seed) for seed in _names(text)] or None
    except ValueError:
        raise UserError(f"--seeds: got {text!r}, expected whole numbers such as 10,20,30") from None


def _print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=printable(title), title_justify="left")
    for column in rows[0] if rows else ["none found"]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row.values()))
    Console().print(table)
