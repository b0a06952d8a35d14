"""What ``output.overwrite`` is about to remove, in one sentence, before anything is removed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dts_hf.errors import UserError
from dts_hf.runs.directory import RunDirectory

#: The scores that a run is known by: the first of them that it has, as it is printed.
_SCORES = {
    "rougeL": "ROUGE-L", "accuracy": "accuracy", "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson correlation",
}  # fmt: skip


def replaced_run(run: RunDirectory) -> str | None:
    """Name, date and score of the run in a directory whose files will be replaced; None where there is none.

    Args:
        run: where the new run goes. Its files may be broken: they are on their way out.
    """
    if not run.recipe_path.is_file():
        return None
    finished = run.metrics_path.is_file()
    newest = max(path.stat().st_mtime for path in (run.recipe_path, run.log_path, run.metrics_path) if path.is_file())
    date = datetime.fromtimestamp(newest).strftime("%Y-%m-%d %H:%M")
    try:
        how = _score(run.read_metrics()) if finished else f"not finished, {_steps(run)} steps logged"
    except (UserError, OSError):
        how = "its files are broken"
    return f"{run.path}: the run '{run.path.resolve().name}' of {date} ({how}) is replaced, as output.overwrite asks"


def _score(metrics: Mapping[str, Any]) -> str:
    models = metrics.get("models")
    student = models.get("student") if isinstance(models, Mapping) else None
    sets = student.get("sets") if isinstance(student, Mapping) else None
    for name, scores in sets.items() if isinstance(sets, Mapping) else ():
        for key, label in _SCORES.items():
            mean = (scores.get(key) or {}).get("mean") if isinstance(scores, Mapping) else None
            if isinstance(mean, int | float):
                return f"finished: {label} {100 * mean:.1f} on {name}"
    return "finished, without a score"


def _steps(run: RunDirectory) -> int:
    steps = (line.get("step") for line in run.read_log() if isinstance(line, Mapping))
    return max((step for step in steps if isinstance(step, int)), default=0)
