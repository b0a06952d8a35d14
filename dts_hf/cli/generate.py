"""``dts-hf generate``: answer prompts, without scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dts_hf.cli.printing import AsJson, print_answer, print_json
from dts_hf.console import show
from dts_hf.recipe.schema import Dtype

EPILOG = (
    'Example: [bold]dts-hf generate runs/first --prompt "Name a fruit"[/bold], or'
    " dts-hf generate runs/first --data rows.jsonl --output answers.jsonl"
)


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="Hub name, folder, or run directory (its student).")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be given several times.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows to answer; with or without answers of their own.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines of the answers; default: printed.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0: the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 16,
    rows: Annotated[int | None, typer.Option(min=1, help="Answer the first so many rows.")] = None,
    template: Annotated[str | None, typer.Option(help="Prompt template; default: the run's, or auto.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer prompts with a student or any model; dts-hf score can score what --output holds."""
    from dts_hf.inference.generate import GenerateOptions, generate_answers

    options = GenerateOptions(
        prompts=tuple(prompt or ()),
        data=data,
        output=output,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        template=template,
        dtype=dtype,
        rows=rows,
        overwrite=overwrite,
    )
    answers = generate_answers(model, options)
    if as_json:
        print_json({"answers": answers})
    elif output is not None:
        show(f"{len(answers):,} answers: {output}")
    else:
        for answer in answers:
            print_answer(answer, alone=len(answers) == 1)
