"""``dts-hf generate``: answer prompts, without scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dts_hf.cli.printing import AsJson, is_main_process, print_answer, print_json
from dts_hf.console import show
from dts_hf.errors import RunError
from dts_hf.recipe.schema import Dtype

if TYPE_CHECKING:
    from dts_hf.inference.generate import GenerateOptions

EPILOG = (
    'Example: [bold]dts-hf generate runs/first --prompt "Name a fruit"[/bold], or'
    " dts-hf generate runs/first --data rows.jsonl --output answers.jsonl; rows to train on:"
    " dts-hf generate TEACHER --data rows.jsonl --output new.jsonl --for-training --temperature 1 --answers 4 --best-of mean"
)
TRAINING_HELP = (
    "Write rows to train on (data.train) to --output: answers that pass filters; a killed call goes on. See "
    "docs/sequence_level.md."
)
SCORER_HELP = "The model whose log-probability --best-of asks; default: MODEL itself."
BEST_HELP = "With --for-training: keep each row's likeliest answer, by log-probability per token or in all."
ForTraining = Annotated[bool, typer.Option("--for-training", help=TRAINING_HELP)]
Split = Annotated[str, typer.Option(help="With --for-training: of a Hub data set, or a folder with splits.")]
Answers = Annotated[int, typer.Option(min=1, help="With --for-training: so many answers a row.")]
BestOf = Annotated[Literal["mean", "sum"] | None, typer.Option(help=BEST_HELP)]
Scorer = Annotated[str | None, typer.Option(metavar="MODEL|RUN", help=SCORER_HELP)]
TopP = Annotated[float, typer.Option(max=1, help="Of sampling: the likeliest tokens of this probability; 1: all.")]
Cut = Annotated[
    Literal["drop", "keep"], typer.Option(help="With --for-training: answers that ran into --max-new-tokens.")
]
MaxRepetition = Annotated[
    float, typer.Option(min=0, max=1, help="With --for-training: largest share of 4-grams said before; 1: any.")
]


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="Hub name, folder, or run directory (its student).")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be given several times.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows to answer; with or without answers of their own.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines of the answers; default: printed.")] = None,
    for_training: ForTraining = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0: the most likely token each time.")] = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 16,
    rows: Annotated[int | None, typer.Option(min=1, help="Answer the first so many rows.")] = None,
    split: Split = "train",
    answers: Answers = 1,
    best_of: BestOf = None,
    scorer: Scorer = None,
    cut: Cut = "drop",
    max_repetition: MaxRepetition = 0.5,
    template: Annotated[str | None, typer.Option(help="Prompt template; default: the run's, or auto.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file, or what was begun with other settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer prompts with a student or any model; dts-hf score can score what --output holds."""
    from dts_hf.inference.generate import GenerateOptions, check_options

    options = GenerateOptions(
        prompts=tuple(prompt or ()),
        data=data,
        output=output,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        template=template,
        dtype=dtype,
        rows=rows,
        overwrite=overwrite,
    )
    of_rows = {"answers": answers > 1, "best-of": best_of, "scorer": scorer, "split": split != "train"}
    check_options(options, for_training, of_rows)
    if for_training and output is not None:
        choice = {"answers": answers, "cut": cut, "max_repetition": max_repetition, "best_of": best_of}
        _write_rows(model, options, output, choice, scorer, split, as_json)
    else:
        _answer(model, options, as_json)


def _answer(model: str, options: GenerateOptions, as_json: bool) -> None:
    from dts_hf.inference.generate import generate_answers

    answers = generate_answers(model, options)
    if as_json:
        print_json({"answers": answers})
    elif options.output is not None:
        show(f"{len(answers):,} answers: {options.output}")
    else:
        for answer in answers:
            print_answer(answer, alone=len(answers) == 1)


def _write_rows(
    model: str,
    options: GenerateOptions,
    output: Path,
    choice: dict[str, Any],
    scorer: str | None,
    split: str,
    as_json: bool,
) -> None:
    from dts_hf.generation.answers import AnswerSettings, said_of, why_none
    from dts_hf.inference.answer_data import AnswerDataOptions, write_answer_data

    asked = AnswerDataOptions(
        str(options.data),
        output,
        AnswerSettings(options.settings, **choice),
        scorer=scorer,
        split=split,
        rows=options.rows,
        template=options.template,
        dtype=options.dtype,
        overwrite=options.overwrite,
    )
    manifest, there = write_answer_data(model, asked)
    if is_main_process() and as_json:
        print_json(manifest)
    elif is_main_process():
        show(f"{output}: {'there already: ' * there}{said_of(manifest['counts'])}")
    if problem := why_none(manifest["counts"]):
        raise RunError(f"{output}: {problem}", everywhere=True)
