"""``dts-hf generate``: answer prompts, without scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dts_hf.cli.printing import AsJson, is_main_process, print_answer, print_json
from dts_hf.console import show
from dts_hf.recipe.schema import Dtype

EPILOG = (
    'Example: [bold]dts-hf generate runs/first --prompt "Name a fruit"[/bold], or'
    " dts-hf generate runs/first --data rows.jsonl --output answers.jsonl; rows to train on:"
    " dts-hf generate TEACHER --data rows.jsonl --out answered.jsonl --temperature 1 --answers 4 --best-of mean"
)
OUT_HELP = (
    "Rows to train on (data.train): answers that pass filters; a killed call goes on. See docs/sequence_level.md."
)
SCORER_HELP = "The model whose log-probability --best-of asks; default: MODEL itself."


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="Hub name, folder, or run directory (its student).")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be given several times.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows to answer; with or without answers of their own.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines of the answers; default: printed.")] = None,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0: the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 16,
    rows: Annotated[int | None, typer.Option(min=1, help="Answer the first so many rows.")] = None,
    split: Annotated[str, typer.Option(help="With --out: of a Hub data set, or a folder with splits.")] = "train",
    answers: Annotated[int, typer.Option(min=1, help="With --out: so many answers a row.")] = 1,
    best_of: Annotated[
        Literal["mean", "sum"] | None,
        typer.Option(help="With --out: keep each row's likeliest answer, by log-probability per token or in all."),
    ] = None,
    scorer: Annotated[str | None, typer.Option(metavar="MODEL|RUN", help=SCORER_HELP)] = None,
    cut: Annotated[
        Literal["drop", "keep"], typer.Option(help="With --out: answers that ran into --max-new-tokens.")
    ] = "drop",
    max_repetition: Annotated[
        float, typer.Option(min=0, max=1, help="With --out: largest share of 4-grams said before; 1: any.")
    ] = 0.5,
    template: Annotated[str | None, typer.Option(help="Prompt template; default: the run's, or auto.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file, or what was begun with other settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer prompts with a student or any model; dts-hf score can score what --output holds."""
    from dts_hf.generation.answers import AnswerSettings, said_of
    from dts_hf.inference.answer_data import AnswerDataOptions, write_answer_data
    from dts_hf.inference.generate import GenerateOptions, check_options, generate_answers

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
    check_options(
        options, out, {"answers": answers > 1, "best-of": best_of, "scorer": scorer, "split": split != "train"}
    )
    if out is not None:
        settings = AnswerSettings(options.settings, answers, cut, max_repetition, best_of)
        manifest, there = write_answer_data(
            model,
            AnswerDataOptions(
                str(data), out, settings, scorer=scorer, split=split, rows=rows, template=template, dtype=dtype,
                overwrite=overwrite,
            ),
        )  # fmt: skip
        if is_main_process() and as_json:
            print_json(manifest)
        elif is_main_process():
            show(f"{out}: {'there already: ' * there}{said_of(manifest['counts'])}")
        return
    found = generate_answers(model, options)
    if as_json:
        print_json({"answers": found})
    elif output is not None:
        show(f"{len(found):,} answers: {output}")
    else:
        for answer in found:
            print_answer(answer, alone=len(found) == 1)
