"""``dts-hf chat``: a conversation with a student, its teacher beside it."""

from __future__ import annotations

from typing import Annotated

import typer

from dts_hf.recipe.schema import Dtype

EPILOG = (
    "Example: [bold]dts-hf chat runs/first[/bold], or in a script:"
    ' echo "Name a fruit" | dts-hf chat runs/first --no-teacher'
)


def command(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="Run directory (its student), folder, or Hub name.")
    ],
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Answer beside it; default: the run's teacher.")
    ] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="The student alone.")] = False,
    system: Annotated[str, typer.Option(help="What the system says.")] = "",
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0: the most likely token each time.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 10,
    template: Annotated[str | None, typer.Option(help="Prompt template; default: the run's, or auto.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the student's weights.")] = None,
) -> None:
    """Talk to a student, its teacher beside it; /help lists what can be typed besides messages."""
    from dts_hf.inference.chat import chat

    chat(
        model,
        teacher=teacher,
        no_teacher=no_teacher,
        system=system,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        template=template,
        dtype=dtype,
    )
