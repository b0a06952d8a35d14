"""``dts-hf pull-cache``: a cache of a teacher's states comes from the Hub into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dts_hf.console import gb, show

EPILOG = "Example: [bold]dts-hf pull-cache me/states caches/mine[/bold]"


def command(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Data set repository on the Hub.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where to; default: the repository's name, here.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: the main branch.")] = None,
) -> None:
    """Download a cache of states, check every file of it, and say what it is."""
    from dts_hf.hub.caches import pull_cache

    target = folder or Path(repo.rpartition("/")[2])
    manifest = pull_cache(repo, target, revision=revision)
    show(f"{target}: {manifest.labels:,} labels of {manifest.rows:,} rows in {manifest.dtype}, {gb(manifest.size)}")
    show(f"teacher: {manifest.identity.model} ({manifest.identity.dtype}), {manifest.nll:.3f} nats per label")
