"""Scores made before training, kept in ``scores.json`` so that a run that is killed does not spend an hour on them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dts_hf.recipe import Recipe
from dts_hf.run_directory import RunDirectory

#: Models that are scored before training starts.
BEFORE = ("teacher", "student_before")


def keep_scores(run: RunDirectory, recipe: Recipe, models: Mapping[str, Any]) -> None:
    """Write the entries of ``metrics.json`` made so far; their predictions and log lines are there already."""
    run.write_scores({"key": _key(recipe), "log_bytes": run.log_size(), "models": models})


def kept_scores(run: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """What ``keep_scores`` wrote, where it is of this recipe and the predictions are there; else empty."""
    made = run.read_scores()
    if made.get("key") != _key(recipe) or not all(run.has_predictions(name) for name in made["models"]):
        return {}
    return made


def _key(recipe: Recipe) -> str:
    """A digest of what these scores depend on, besides what a resume checks anyway (the rows, the batch size)."""
    values = recipe.model_dump(mode="json")
    parts = {name: values[name] for name in ("student", "teacher", "task", "evaluation")}
    parts["evaluation"] = {**parts["evaluation"], "batch_size": None, "every_steps": None}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
