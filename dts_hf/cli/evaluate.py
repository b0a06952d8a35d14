"""``dts-hf evaluate``: answer held-out prompts and score the answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dts_hf.cli.printing import AsJson, is_main_process, print_json, print_table
from dts_hf.errors import UserError
from dts_hf.recipe.schema import Dtype

PROTOCOL_HELP = (
    "See dts-hf list protocols; default: the student's own (dts_hf.json); for prepared sets and foreign models minillm, in "
    "the student's template."
)
TEMPLATE_HELP = "Prompt template; default: the protocol's; for a foreign model its chat template where it has one."
Backend = Literal["dts_hf", "vllm"]
EPILOG = (
    "Example: [bold]dts-hf evaluate runs/first --sets dolly,self_instruct,vicuna --protocol minillm"
    " --output runs/first/benchmark[/bold]"
)


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="Hub name, folder, or run directory: one score for all.")
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
        typer.Option(help=PROTOCOL_HELP),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N", help="Sample once per seed; default: as the protocol says.")
    ] = None,
    template: Annotated[str | None, typer.Option(help=TEMPLATE_HELP)] = None,
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
        typer.Option(help="Type of the weights; default: as the student was scored, for a foreign model float32."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for metrics and predictions; a killed evaluation goes on from there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another evaluation in that folder.")] = False,
    backend: Annotated[Backend, typer.Option(help="What generates; vllm is a protocol of its own.")] = "dts_hf",
    as_json: AsJson = False,
) -> None:
    """Answer held-out prompts with a model, and score the answers (ROUGE-L, exact match, repetition)."""
    from dts_hf.evaluation.evaluate import evaluate
    from dts_hf.evaluation.options import EvaluationOptions

    options = EvaluationOptions(
        sets=_names(sets),
        data=data,
        protocol=protocol,
        seeds=_seeds(seeds),
        template=template,
        max_new_tokens=max_new_tokens,
        no_repeat_ngram_size=no_repeat_ngram_size,
        rows=rows,
        batch_size=batch_size,
        dtype=dtype,
        output=output,
        overwrite=overwrite,
        backend=backend,
    )
    metrics = evaluate(model, options)
    if is_main_process():
        (print_json if as_json else print_evaluation)(metrics)


def print_evaluation(metrics: Mapping[str, Any]) -> None:
    """Print one line for each set: means over seeds, ± the standard deviation over seeds where there is one."""
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
    print_table(f"{metrics['source']}: protocol {protocol['name']} ({protocol['fingerprint']})", rows)


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
