"""``dts-hf push-cache``: a cache of a teacher's states goes to the Hub as a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dts_hf.console import show

EPILOG = "Example: [bold]dts-hf push-cache caches/mine --repo me/states[/bold]"


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished cache.")],
    repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Data set repository; default: the folder's name.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; by default it is private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; it is made where there is none.")] = None,
) -> None:
    """Check a cache of states, and upload it as a data set; what the Hub has already is not sent again."""
    from dts_hf.hub.caches import push_cache

    show(push_cache(folder, repo, private=not public, revision=revision))
