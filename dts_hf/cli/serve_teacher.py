"""``dts-hf serve-teacher``: a teacher on this machine, for trainers on others."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dts_hf.recipe.schema import Dtype, Quantization

EPILOG = (
    "Example: [bold]dts-hf serve-teacher recipe.yaml[/bold], or for other machines:"
    " TEACHER_TOKEN=$(openssl rand -hex 32) dts-hf serve-teacher MODEL --host 0.0.0.0 --token-env TEACHER_TOKEN"
)


def command(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe (its teacher), Hub name, folder or GGUF file.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8765,
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the token that clients must bear.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the weights; default: the recipe's, or bfloat16.")
    ] = None,
    quantization: Annotated[Quantization | None, typer.Option(help="As teacher.quantization has it.")] = None,
    queue: Annotated[
        int, typer.Option(min=1, help="Questions that may wait; the next one is told to come again.")
    ] = 16,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds after which an answer is too late.")] = 120.0,
    max_rows: Annotated[int, typer.Option(min=1, help="Most rows of one question.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of one question.")] = 65_536,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of one row; default: the model's positions, 8192 at most.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a forward, padding included.")] = 16_384,
    engine: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="What runs the model; vllm: for one of several GPUs.")
    ] = "transformers",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that vLLM puts each layer on.")] = 1,
) -> None:
    r"""Serve a teacher's final states over HTTP, for recipes with teacher.kind: remote; needs dts-hf\[server]."""
    from dts_hf.serving.serve import ServeOptions, serve_teacher

    options = ServeOptions(
        host=host,
        port=port,
        token_env=token_env,
        queue=queue,
        seconds=deadline,
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_length=max_length,
        batch_tokens=batch_tokens,
        engine=engine,
        tensor_parallel=tensor_parallel,
    )
    serve_teacher(source, options, dtype=dtype, quantization=quantization)
