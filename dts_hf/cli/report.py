"""``dts-hf report``: the figures, the report and the model card of a run once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dts_hf.console import show

EPILOG = "Example: [bold]dts-hf report runs/quickstart[/bold]"


def command(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]) -> None:
    """Write figures, report.html and the model card again from a run directory."""
    from dts_hf.reporting.report import write_report
    from dts_hf.runs.directory import RunDirectory

    show(write_report(RunDirectory.open(run)))
