"""``dts-hf score``: score answers that are already written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dts_hf.cli.printing import AsJson, print_json, print_table

EPILOG = 'Example: [bold]dts-hf score answers.jsonl[/bold], rows of {"prediction": ..., "references": [...]}'
#: Scores that are shares; tables show them x 100, as the literature does.
SHARES = ("rougeL", "exact_match", "repeats_4gram", "cut_at_limit", "empty")


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL of predictions with their references.")],
    as_json: AsJson = False,
) -> None:
    """Score answers that are already written, without any model: each set for itself, means over seeds."""
    from dts_hf.evaluation.score import score_file

    scores = score_file(file)
    if as_json:
        print_json(scores)
    elif "sets" in scores:
        for name, of_set in scores["sets"].items():
            print_scores(f"{file}: {name}", of_set)
    else:
        print_scores(str(file), scores)


def print_scores(title: str, scores: Mapping[str, Any]) -> None:
    """Print the scores of one set."""
    rows = []
    for key, value in scores.items():
        share = key in SHARES
        rows.append(
            {"score": f"{key} x 100" if share else key, "value": f"{100 * value:.4f}" if share else str(value)}
        )
    print_table(title, rows)
