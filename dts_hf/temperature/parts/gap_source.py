"""Which gap drives a policy: that of the rows it trains on, of held-out rows, or, as a control, those of a finished run.

``gap_source: held_out`` or ``{held_out: {every: STEPS, rows: ROWS}}`` measures it on held-out rows, the same ones each
time, before the first step and after every ``every``-th (50); what acts in between is the last one measured. On rows that
training has seen before, the gap no longer says how far the student is: it turns negative, and the policy is left with
its schedule. See [the gap](gap.md) for what it costs.

``gap_source: {replay: RUN, order: ORDER}`` plays the gaps of RUN: ``recorded`` as they came, ``permuted`` one by one, or in
permuted ``blocks`` of ``block`` steps (a twentieth of the run and at least 2 when left out), by a generator of its own with
``seed``.
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
from dts_hf.temperature.base import Mechanism, Probe, StepStats, check_whole
from dts_hf.temperature.parts.recorded_run import RecordedRun, read_trace, step_at

Order = Literal["recorded", "permuted", "blocks"]
ORDERS: tuple[Order, ...] = get_args(Order)
#: Steps in a block, and the seed of a permutation.
BLOCK, SEED = Between(low=1), Between(low=0)
#: ``order: blocks`` cuts the run into so many blocks where no length is given.
BLOCKS = 20
#: And into no shorter ones: of one step they would be what ``permuted`` is.
LEAST_BLOCK = 2
_WORDS = ("measured", "held_out")
#: Held-out rows: how many optimizer steps from one measurement to the next, and on how many rows.
EVERY, ROWS = Between(low=1), Between(low=1)
DEFAULT_PROBE = Probe(every=50, rows=64)
_HELD_OUT = Keys((("every", Annotated[int, EVERY]), ("rows", Annotated[int, ROWS])))
_MAPPING = Keys(
    (
        ("replay", str),
        ("order", Order),
        ("block", Annotated[int, BLOCK] | None),
        ("held_out", Annotated[Mapping[str, Any], _HELD_OUT] | None),
    )
)
#: ``measured``, ``held_out``, ``{held_out: {every: STEPS, rows: ROWS}}``, or ``{replay: RUN, order: ORDER, block: STEPS}``.
GapSource: TypeAlias = Literal["measured", "held_out"] | Annotated[Mapping[str, Any], _MAPPING]


class MeasuredGaps(Mechanism):
    """The gap of this run's last step: ``gap_source: measured``."""

    state_fields: ClassVar[tuple[str, ...]] = ("gap", "ignored_gaps")
    #: Whose gaps they are where they are not those of the rows that are trained on; else empty.
    foreign: ClassVar[str] = ""

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


class HeldOutGaps(MeasuredGaps):
    """The gap of held-out rows, measured every few steps: ``gap_source: held_out``.

    Args:
        gap_source: as the recipe has it.

    Raises:
        UserError: a key or a value below ``held_out`` is not one of those.
    """

    foreign = "held-out rows"

    def __init__(self, gap_source: GapSource) -> None:
        super().__init__()
        options = gap_source["held_out"] if isinstance(gap_source, Mapping) else {}
        if not isinstance(options, Mapping):
            raise UserError(
                f"temperature.gap_source.held_out: got {options!r}, expected a mapping with every (optimizer steps) and rows"
            )
        _check_keys("gap_source.held_out", options, _HELD_OUT)
        for key, value in options.items():
            if value is None or check_whole(f"gap_source.held_out.{key}", value, 1, "a whole number from 1") is None:
                raise UserError(f"temperature.gap_source.held_out.{key}: got null, expected a whole number from 1")
        self.gap_source, self.probe = gap_source, DEFAULT_PROBE._replace(**options)

    def end_step(self, stats: StepStats) -> None:
        """What the training rows say is without effect."""

    def take_held_out(self, stats: StepStats) -> None:
        """Keep the gap of the held-out rows."""
        super().end_step(stats)

    def log_values(self) -> dict[str, float]:
        """The gap in force, as ``held_out_gap``: the column ``gap`` is that of the training rows."""
        return {"held_out_gap": math.nan if self.gap is None else self.gap}


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
    foreign = "a recorded run"

    def __init__(self, gap_source: Mapping[str, Any], seed: int | None) -> None:
        MeasuredGaps.__init__(self)
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
        length = 1 if self.order == "permuted" else self.block or max(LEAST_BLOCK, len(gaps) // BLOCKS)
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
    if not isinstance(value, Mapping) and value not in _WORDS:
        gone = " 'shuffled' was no control: it drew early gaps far too often."
        hint = gone if value == "shuffled" else nearest(str(value), _WORDS)
        raise UserError(
            f"temperature.gap_source: got {value!r}, expected measured, held_out, or {{replay: RUN, order: permuted}} with "
            f"the run directory of a finished run.{hint}"
        )
    seed = check_whole("seed", seed, int(SEED.low), "a whole number from 0")
    source = _source_of(value, seed)
    if source.foreign and granularity != "batch":
        raise UserError(
            f"temperature.gap_source: got {source.foreign} with granularity '{granularity}', expected granularity 'batch'; "
            "they have no gap for each row of this run"
        )
    if seed is not None and (not isinstance(source, ReplayedGaps) or source.order == "recorded"):
        raise UserError(
            f"temperature.seed: got {seed}, but nothing is drawn; expected no seed, or a gap_source with order "
            "'permuted' or 'blocks'"
        )
    return source


def _source_of(value: Any, seed: int | None) -> MeasuredGaps:
    """``value`` is one of ``_WORDS`` or a mapping."""
    if isinstance(value, Mapping):
        _check_keys("gap_source", value, _MAPPING)
    if value == "measured":
        return MeasuredGaps()
    if value == "held_out" or value.get("held_out") is not None:
        if value != "held_out" and len(value) > 1:
            other = next(key for key in value if key != "held_out")
            raise UserError(
                f"temperature.gap_source.{other}: got {value[other]!r} beside held_out, expected one of the two"
            )
        return HeldOutGaps(value)
    return ReplayedGaps(value, seed)


def _check_keys(place: str, given: Mapping[Any, Any], keys: Keys) -> None:
    known = [key for key, _ in keys.types]
    for key in given:
        if key not in known:
            raise UserError(
                f"temperature.{place}.{key}: unknown key, expected one of {', '.join(known)}.{nearest(str(key), known)}"
            )
