"""Scores made before training, kept in ``scores.json`` so that a run that is killed does not spend an hour on them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dts_hf.runs.directory import RunDirectory

#: Models that are scored before training starts.
BEFORE = ("teacher", "student_before")


def keep_scores(run: RunDirectory, models: Mapping[str, Any]) -> None:
    """Write the entries of ``metrics.json`` made so far; their predictions and log lines are there already."""
    run.write_scores({"log_bytes": run.log_size(), "models": models})


def kept_scores(run: RunDirectory) -> dict[str, Any]:
    """What ``keep_scores`` wrote, where the predictions are there; else empty.

    That recipe, rows and launch are the same is the caller's to check, for these scores as for the checkpoints.
    """
    scores = run.read_scores()
    return scores if all(run.has_predictions(name) for name in scores.get("models", {})) else {}
