"""``dts-hf push``: a finished student goes to the Hub, with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dts_hf.console import show

EPILOG = "Example: [bold]dts-hf push runs/quickstart --repo me/small --dry-run[/bold]"


def command(
    source: Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="Run directory, or folder of a student.")],
    repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Repository; default: the recipe's, or the folder's name.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; by default it is private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; it is made where there is none.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files that would be uploaded, and upload nothing.")
    ] = False,
) -> None:
    """Upload a student and its card; what the Hub has already is not sent again."""
    from dts_hf.hub import push

    private = False if public else None
    if not dry_run:
        show(push.push(source, repo, private=private, revision=revision))
        return
    from dts_hf.cli.printing import print_table

    to = push.destination(source, repo, private=private, revision=revision)
    with push.staged_source(source, to.repository, online=False) as ready:
        rows = [{"file": name, "bytes": f"{size:,}"} for name, size in ready.files]
        total = ready.size
    print_table(f"{to.repository} ({'private' if to.private else 'public'}): {len(rows)} files, {total}", rows)
