"""What a finished run has left in its run directory, step by step: for every control that repeats a part of it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from dts_hf.errors import UserError, nearest
from dts_hf.temperature.base import Mechanism

logger = logging.getLogger(__name__)
#: In a line of the log that is about text of the student's own.
OWN_TEXT = "generated_ce_loss"


class RecordedRun(Mechanism):
    """Numbers made of the log of a finished run.

    They are read once, before training, and are part of every checkpoint: a resumed run does not need the other one any
    more. A subclass says what it reads.

    Args:
        option: the recipe key below ``temperature`` that names the run, for messages.
        run: its run directory; whether there is one is seen when it is read.

    Raises:
        UserError: ``run`` cannot be a path.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("recorded",)

    def __init__(self, option: str, run: object) -> None:
        if not isinstance(run, (str, os.PathLike)) or not str(run):
            given = "is missing" if run is None else f"got {run!r}"
            raise UserError(f"temperature.{option}: {given}, expected the run directory of a finished run")
        self.option, self.run = option, str(run)
        self.recorded: list[Any] = []

    def read(self, steps: int | None) -> list[Any]:
        """What is kept of the recorded run, at least one number; ``steps`` is the length of this run, where it is known.

        Raises:
            UserError: see ``read_trace``.
        """
        raise NotImplementedError

    def steps_needed(self) -> int | None:
        """How many optimizer steps a run must have that repeats what was read; None: any number."""
        return len(self.recorded)

    def begin_run(self, steps: int | None) -> None:
        """Read the run, unless a checkpoint has brought its numbers, and compare the lengths of the two.

        Raises:
            UserError: see ``read``; or this run has another length, so what it repeats would not be what was recorded.
        """
        if not self.recorded:
            self.recorded = self.read(steps)
        needed = self.steps_needed()
        if steps is not None and needed is not None and steps != needed:
            raise UserError(
                f"temperature.{self.option}: {self.run} has {needed:,} optimizer steps and this run {steps:,}; expected a "
                f"run of the same length, for instance training.max_steps: {needed}"
            )

    def check_read(self, policy: str) -> None:
        """Refuse to go on without the numbers: a loop that forgets ``begin_run`` must not train at others.

        Raises:
            ValueError: nothing was read and no state was loaded.
        """
        if not self.recorded:
            raise ValueError(f"{policy}: the recorded run was not read yet; call begin_run before the first step")


def step_at(progress: float, steps: int) -> int:
    """Which of ``steps`` optimizer steps begins at ``progress`` = step / steps, from 0."""
    return min(int(progress * steps + 1e-6), steps - 1)


def read_trace(option: str, run: str, column: str) -> list[float | None]:
    """``column`` of the log at each optimizer step of ``run``; None where it was non-finite.

    A line of the log holds the mean over the steps since the line before, and stands for each of them; the steps after
    the last line take its value.

    Args:
        option: the recipe key below ``temperature`` that names the run, for messages.
        run: a run directory, with ``log.jsonl`` and ``metrics.json``.
        column: ``gap``, ``temperature`` or ``teacher_temperature``.

    Raises:
        UserError: there is no such run, it has not finished, or its log does not have the column; or it is the gap of a run
            some of whose steps have none, for they were on text of the student's own.
    """
    folder, key = Path(run), f"temperature.{option}"
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise UserError(
            f"{key}: {run}: no such folder, expected the run directory of a finished run."
            f"{nearest(folder.name, siblings)}"
        )
    for name in ("log.jsonl", "metrics.json"):
        if not (folder / name).is_file():
            raise UserError(f"{key}: {folder / name}: no such file, expected the run directory of a finished run")
    steps = _steps(key, folder / "metrics.json")
    lines: list[tuple[int, float | None]] = []
    for step, value in _log_lines(key, folder / "log.jsonl", column):
        while lines and lines[-1][0] >= step:  # of an attempt of the run that did not last
            lines.pop()
        lines.append((step, value))
    if not lines:
        raise UserError(
            f"{key}: {folder / 'log.jsonl'}: holds no line about training; expected a run with training.logging_steps 1, or "
            f"at least below its {steps:,} steps"
        )
    if all(value is None for _, value in lines):
        raise UserError(
            f"{key}: {folder / 'log.jsonl'}: none of its {len(lines):,} lines about training has a {column}"
        )
    ends = [0, *(step for step, _ in lines)]
    spacing = max(end - start for start, end in pairwise(ends))
    if not 0 <= steps - ends[-1] < spacing:
        raise UserError(
            f"{key}: {folder / 'log.jsonl'}: ends with step {ends[-1]:,} of a run of {steps:,} steps; expected a whole log"
        )
    trace: list[float | None] = []
    for step, value in lines:
        trace += [value] * (step - len(trace))
    if len(lines) < steps:
        logger.warning(
            "%s: %s has %d lines for %d steps, so the %s of a step is the mean of its line%s; record the run with "
            "training.logging_steps: 1 to have it exactly", key, folder / "log.jsonl", len(lines), steps, column,
            f", and the {steps - len(trace)} steps after the last line take its value" if len(trace) < steps else "",
        )  # fmt: skip
    return trace + trace[-1:] * (steps - len(trace))


def _steps(key: str, path: Path) -> int:
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["training"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        steps = None
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"{key}: {path}: got {steps!r} for training.steps, expected a whole number from 1")
    return steps


def _log_lines(key: str, path: Path, column: str) -> Iterator[tuple[int, float | None]]:
    """(optimizer step, value) of each line about training."""
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
            if line["kind"] == "train":
                if column == "gap" and OWN_TEXT in line:
                    raise UserError(
                        f"{key}: {path}: line {number} is about text of the student's own, which has no gap of the data; "
                        "expected a run without data.on_policy"
                    )
                yield int(line["step"]), _finite(line.get(column))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(f"{key}: {path}: line {number} is no line of a log") from None


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
