"""How long runs will take, from those of the same study that have ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from dts_hf.errors import UserError
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.directory import RunDirectory


@dataclass(frozen=True)
class Size:
    """How much a run trains.

    Attributes:
        steps: optimizer steps; None: so many as ``epochs`` have.
        epochs: passes over the rows.
        rows: of an optimizer step, on one device.
    """

    steps: int | None = None
    epochs: float = 3.0
    rows: int = 8

    @classmethod
    def of(cls, recipe: Recipe) -> Size:
        """That of ``recipe``; what it does not say is as ``TrainingArguments`` has it."""
        given = {key: value for key, value in recipe.training.items() if value is not None}
        steps = int(given.get("max_steps", -1))
        accumulation = int(given.get("gradient_accumulation_steps", 1))
        rows = int(given.get("per_device_train_batch_size", cls.rows)) * accumulation
        return cls(steps if steps > 0 else None, float(given.get("num_train_epochs", cls.epochs)), rows)


@dataclass(frozen=True)
class Pace:
    """What a run of a study costs.

    Attributes:
        row: seconds of training for a row.
        beside: seconds of a run that are no training: loading and scoring.
        rows: of an epoch.
        runs: that it was measured on.
    """

    row: float
    beside: float
    rows: float
    runs: int

    def seconds(self, size: Size) -> float:
        """What a run of this size takes."""
        rows = size.epochs * self.rows if size.steps is None else size.steps * size.rows
        return self.beside + rows * self.row


def measured(path: Path, size: Size) -> Pace | None:
    """The pace of one run that has ended; None where its files do not say it.

    Args:
        path: the run directory.
        size: how much it has trained.
    """
    run = RunDirectory(path)
    try:
        training, manifest = run.read_metrics()["training"], run.read_data_manifest()
        steps, seconds, whole = (float(training[key]) for key in ("steps", "seconds", "total_seconds"))
        rows = float(manifest["splits"]["train"]["kept"])
    except (UserError, KeyError, TypeError, ValueError):  # damaged, or of an older version
        return None
    return Pace(seconds / (steps * size.rows), max(whole - seconds, 0.0), rows, 1) if steps > 0 else None


def mean_of(paces: Iterable[Pace | None]) -> Pace | None:
    """The mean of those that are known; None where none is."""
    found = [pace for pace in paces if pace is not None]
    if not found:
        return None
    row, beside, rows = (fmean(getattr(one, key) for one in found) for key in ("row", "beside", "rows"))
    return Pace(row, beside, rows, len(found))
