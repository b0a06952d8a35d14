"""Which gap drives a policy: the one that it measures, or those of a finished run, as a control.

``gap_source: {replay: RUN, order: ORDER}`` plays the gaps of RUN: ``recorded`` as they came, ``permuted`` one by one, or in
permuted ``blocks`` of ``block`` steps (a twentieth of the run when left out), by a generator of its own with ``seed``.
Whatever this run measures is then without effect on its temperature. RUN must be as long as the run that replays it, and
the policy one that takes the mean gap of a step: a log has one gap for each.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from dts_hf.errors import UserError, nearest
from dts_hf.registry import Between, Keys
from dts_hf.temperature.base import Mechanism, StepStats, check_whole
from dts_hf.temperature.parts.recorded_run import RecordedRun, read_trace, step_at

Order = Literal["recorded", "permuted", "blocks"]
ORDERS: tuple[Order, ...] = get_args(Order)
#: Steps in a block, and the seed of a permutation.
BLOCK, SEED = Between(low=1), Between(low=0)
#: ``order: blocks`` cuts the run into so many blocks where no length is given.
BLOCKS = 20
_REPLAY = Keys((("replay", str), ("order", Order), ("block", Annotated[int, BLOCK] | None)))
_KEYS = tuple(key for key, _ in _REPLAY.types)
#: ``measured``, or ``{replay: RUN, order: ORDER, block: STEPS}``.
GapSource: TypeAlias = Literal["measured"] | Annotated[Mapping[str, Any], _REPLAY]


class MeasuredGaps(Mechanism):
    """The gap of this run's last step: ``gap_source: measured``."""

    state_fields: ClassVar[tuple[str, ...]] = ("gap", "ignored_gaps")

    def __init__(self) -> None:
        self.gap_source: GapSource = "measured"
        self.gap: float | None = 0.0  # None where it was non-finite: JSON has no NaN
        self.ignored_gaps = 0

    def end_step(self, stats: StepStats) -> None:
        """Keep the gap of the step that just ended."""
        self.gap = stats.gap if math.isfinite(stats.gap) else None

    def counters(self) -> dict[str, int]:
        """How many gaps were non-finite, and so moved nothing."""
        return {"ignored_gaps": self.ignored_gaps}

    def next_gap(self, progress: float) -> float | None:
        """The gap that acts at the step which begins at ``progress``, in nats; None, and counted, where it says nothing."""
        gap = self._at(progress)
        self.ignored_gaps += gap is None
        return gap

    def check_read(self, policy: str) -> None:
        """Nothing has to be read before the first step."""

    def _at(self, progress: float) -> float | None:
        return self.gap


class ReplayedGaps(RecordedRun, MeasuredGaps):
    """The gaps of a finished run in some order, in place of the measured ones.

    Args:
        gap_source: the mapping of the recipe: ``replay``, the run directory; ``order``, one of ``ORDERS``; ``block``, the
            steps in a block.
        seed: of the permutation; no other random generator is touched.

    Raises:
        UserError: a key or a value is not one of those.
    """

    state_fields: ClassVar[tuple[str, ...]] = (*MeasuredGaps.state_fields, *RecordedRun.state_fields)

    def __init__(self, gap_source: Mapping[str, Any], seed: int | None) -> None:
        MeasuredGaps.__init__(self)
        for key in gap_source:
            if key not in _KEYS:
                raise UserError(
                    f"temperature.gap_source.{key}: unknown key, expected one of {', '.join(_KEYS)}."
                    f"{nearest(str(key), _KEYS)}"
                )
        RecordedRun.__init__(self, "gap_source.replay", gap_source.get("replay"))
        self.gap_source, self.seed = gap_source, seed
        self.order, self.block = gap_source.get("order", "recorded"), gap_source.get("block")
        if self.order not in ORDERS:
            raise UserError(
                f"temperature.gap_source.order: got {self.order!r}, expected one of {', '.join(ORDERS)}."
                f"{nearest(str(self.order), ORDERS)}"
            )
        check_whole("gap_source.block", self.block, int(BLOCK.low), "a whole number of steps from 1")
        if self.block is not None and self.order != "blocks":
            raise UserError(
                f"temperature.gap_source.block: got {self.block} with order '{self.order}', expected it left out, or "
                "order 'blocks'"
            )

    def read(self, steps: int | None) -> list[float | None]:
        """The gap that acts at each step but the first, which has none; None where it was non-finite.

        The last step's gap has never driven a temperature and is left out, so every order plays the same numbers.

        Raises:
            UserError: see ``read_trace``; or the run has one step.
        """
        gaps = read_trace(self.option, self.run, "gap")[:-1]
        if not gaps:
            raise UserError(f"temperature.{self.option}: {self.run} has one optimizer step, expected two or more")
        if self.order == "recorded":
            return gaps
        length = 1 if self.order == "permuted" else self.block or max(1, len(gaps) // BLOCKS)
        blocks = [gaps[start : start + length] for start in range(0, len(gaps), length)]
        random.Random(f"dts permutes gaps {self.seed or 0}").shuffle(blocks)
        return [gap for block in blocks for gap in block]

    def steps_needed(self) -> int | None:
        """One step more than there are gaps: the first step has none."""
        return len(self.recorded) + 1

    def _at(self, progress: float) -> float | None:
        step = max(step_at(progress, len(self.recorded) + 1), 1)  # the first step has none, and never asks
        gap: float | None = self.recorded[step - 1]
        return gap


def gap_source_of(value: object, seed: object, granularity: str = "batch") -> MeasuredGaps:
    """The source that the options of a policy ask for.

    Args:
        value: the option ``gap_source``.
        seed: the option ``seed``.
        granularity: what the policy takes the mean gap over.

    Raises:
        UserError: an option is out of range, or does not go with the others.
    """
    if not isinstance(value, Mapping) and value != "measured":
        gone = " 'shuffled' was no control: it drew early gaps far too often."
        hint = gone if value == "shuffled" else nearest(str(value), ["measured"])
        raise UserError(
            f"temperature.gap_source: got {value!r}, expected measured, or {{replay: RUN, order: permuted}} with the "
            f"run directory of a finished run.{hint}"
        )
    seed = check_whole("seed", seed, int(SEED.low), "a whole number from 0")
    source = ReplayedGaps(value, seed) if isinstance(value, Mapping) else MeasuredGaps()
    if isinstance(source, ReplayedGaps) and granularity != "batch":
        raise UserError(
            f"temperature.gap_source: got a recorded run with granularity '{granularity}', expected granularity "
            "'batch'; a log has one gap for each step"
        )
    if seed is not None and (not isinstance(source, ReplayedGaps) or source.order == "recorded"):
        raise UserError(
            f"temperature.seed: got {seed}, but nothing is drawn; expected no seed, or a gap_source with order "
            "'permuted' or 'blocks'"
        )
    return source
