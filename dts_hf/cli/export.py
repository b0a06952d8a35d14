"""``dts-hf export``: a finished student in its quantised form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dts_hf.cli.printing import AsJson, print_json
from dts_hf.console import show
from dts_hf.errors import UserError

EPILOG = (
    "Example: [bold]dts-hf export runs/int4 --quantized --output students/int4[/bold], then dts-hf push students/int4"
)


def command(
    source: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="Run directory, or folder of a student.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the exported student.")],
    quantized: Annotated[
        bool, typer.Option("--quantized", help="Quantise its weights, as training with student.quantize rounded them.")
    ] = False,
    scheme: Annotated[
        str | None, typer.Option(help="As student.quantize.scheme; default: what the student was trained for.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(min=0, help="Weights that share a scale, 0: those of a row; default: as it was trained."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows to compare the losses on; default: the held-out rows of the run."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16, of what stays unquantised; default: as its files."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in that folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a student's quantised form, as from_pretrained loads it; its loss is compared with the trained one's first."""
    if not quantized:
        raise UserError(
            "--quantized: is missing; it is the only form that is exported (final/ is the student as it is)"
        )
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype: got {dtype!r}, expected float32, bfloat16 or float16")
    from dts_hf.language_modeling.export import ExportOptions, export_quantized

    found = export_quantized(source, output, ExportOptions(scheme, group_size, data, dtype, overwrite))
    if as_json:
        print_json(found.facts())
    else:
        show(f"{output}: {found.sentence()}")
