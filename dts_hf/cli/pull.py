"""``dts-hf pull``: a student comes from the Hub into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dts_hf.console import show

EPILOG = "Example: [bold]dts-hf pull me/small students/small[/bold]"


def command(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where to; default: the repository's name, here.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: the main branch.")] = None,
) -> None:
    """Download a student (safetensors, no code) and say what it is."""
    from dts_hf.hub import pull

    target = folder or Path(repo.rpartition("/")[2])
    pull.pull(repo, target, revision=revision)
    for name, value in pull.described(target):
        show(f"{name}: {value}")
