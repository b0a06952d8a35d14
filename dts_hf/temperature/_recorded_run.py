"""What a finished run has left in its run directory, step by step: read by every control that repeats a part of it."""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dts_hf.errors import UserError, nearest
from dts_hf.temperature.base import check_whole

logger = logging.getLogger(__name__)

ORDERS = ("recorded", "permuted", "blocks")
#: ``order: blocks`` cuts the run into so many blocks where no length is given.
BLOCKS = 20


def check_run(option: str, value: object) -> str:
    """Return ``value`` where it can be the path of a run directory; whether there is one is seen when it is read."""
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        found = "is missing" if value is None else f"got {value!r}"
        raise UserError(f"temperature.{option}: {found}, expected the run directory of a finished run")
    return str(value)


def check_length(option: str, run: str, recorded: int, steps: int | None) -> None:
    """Refuse a run of another length than the recorded one: what is repeated would not be what was recorded.

    Raises:
        UserError: ``steps`` (None: not known yet) is not ``recorded``.
    """
    if steps is not None and steps != recorded:
        raise UserError(
            f"temperature.{option}: {run} has {recorded:,} optimizer steps and this run {steps:,}; expected a run of the "
            f"same length, for instance training.max_steps: {recorded}"
        )


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
        UserError: there is no such run, it has not finished, or its log does not have the column.
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
                yield int(line["step"]), _finite(line.get(column))
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UserError(f"{key}: {path}: line {number} is no line of a log") from None


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


@dataclass(frozen=True)
class GapSource:
    """``gap_source`` as a mapping: the gaps of a finished run drive this one.

    Attributes:
        replay: its run directory.
        order: one of ``ORDERS``.
        block: steps in a block, for ``blocks``; None for one in ``BLOCKS`` of the run.
    """

    replay: str
    order: str = "recorded"
    block: int | None = None

    @classmethod
    def of(cls, value: object) -> GapSource | None:
        """Check what a recipe says; None for ``measured``.

        Raises:
            UserError: a key or a value is not one of those above.
        """
        if value == "measured":
            return None
        if not isinstance(value, Mapping):
            gone = " 'shuffled' was no control: it drew early gaps far too often."
            hint = gone if value == "shuffled" else nearest(str(value), ["measured"])
            raise UserError(
                f"temperature.gap_source: got {value!r}, expected measured, or {{replay: RUN, order: permuted}} with the "
                f"run directory of a finished run.{hint}"
            )
        known = tuple(cls.__dataclass_fields__)
        for option in value:
            if option not in known:
                raise UserError(
                    f"temperature.gap_source.{option}: unknown key, expected one of {', '.join(known)}."
                    f"{nearest(str(option), known)}"
                )
        source = cls(**{**value, "replay": check_run("gap_source.replay", value.get("replay"))})
        if source.order not in ORDERS:
            raise UserError(
                f"temperature.gap_source.order: got {source.order!r}, expected one of {', '.join(ORDERS)}."
                f"{nearest(str(source.order), ORDERS)}"
            )
        check_whole("gap_source.block", source.block, 1, "a whole number of steps from 1")
        if source.block is not None and source.order != "blocks":
            raise UserError(
                f"temperature.gap_source.block: got {source.block} with order '{source.order}', expected it left out, or "
                "order 'blocks'"
            )
        return source

    def gaps(self, seed: int) -> list[float | None]:
        """The gap that acts at each step but the first, which has none: one less than the run has steps.

        The last step's gap has never driven a temperature and is left out, so every order plays the same numbers.

        Raises:
            UserError: see ``read_trace``.
        """
        gaps = read_trace("gap_source.replay", self.replay, "gap")[:-1]
        if not gaps:
            raise UserError(
                f"temperature.gap_source.replay: {self.replay} has one optimizer step, expected two or more"
            )
        if self.order == "recorded":
            return gaps
        length = 1 if self.order == "permuted" else self.block or max(1, len(gaps) // BLOCKS)
        blocks = [gaps[start : start + length] for start in range(0, len(gaps), length)]
        random.Random(f"dts permutes gaps {seed}").shuffle(blocks)
        return [gap for block in blocks for gap in block]
