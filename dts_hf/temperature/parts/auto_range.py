"""The range [t_min, t_max] of a schedule, as given, or solved from how many tokens the teacher is to offer.

``range: auto`` asks for two effective supports, exp of the teacher's mean entropy, in place of two temperatures. The first
step runs at T = 1 and measures the teacher's entropy at 19 temperatures from 1/4 to 16, at the price of as many softmaxes of
the teacher in that step alone. Then t_init = t_max and t_min are those at which the support is ``support_max`` and
``support_min``. A support that the teacher does not reach ends the run there; two classes and supports beyond the vocabulary
are refused before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.registry import Between
from dts_hf.temperature.base import (
    Mechanism,
    StepStats,
    check_between,
    check_choice,
    check_number,
    check_range,
    check_temperature,
)

#: Where the teacher's entropy is measured: three temperatures an octave, from 1/4 to 16.
SUPPORT_GRID = tuple(0.25 * 2.0 ** (k / 3) for k in range(19))
RangeKind = Literal["manual", "auto"]
#: An effective support, in tokens.
SUPPORT = Between(low=1.0)
#: The first step of ``range: auto`` runs here: nothing is known of the teacher yet.
_AUTO_START = 1.0


class TemperatureRange(Mechanism):
    """t_init and [t_min, t_max] of a schedule; a kind of range may learn them in the first step."""

    range: ClassVar[str]
    #: Whether ``observe`` looks at the logits.
    observes: bool = False

    @property
    def in_force(self) -> tuple[float, float, float]:
        """(t_init, t_min, t_max)."""
        raise NotImplementedError

    def observe(self, teacher_logits: Tensor) -> list[Tensor]:
        """What ``end_step`` needs to know of a chunk ``[C, V]``: columns ``[C, K]``, the last ones of ``observed``."""
        return []


class ManualRange(TemperatureRange):
    """The range that the options give: ``range: manual``.

    Args:
        policy: its name, for messages.
        t_init: temperature of the first step; 3 when left out.
        t_min: floor, above 0; 1 when left out.
        t_max: ceiling, at least ``t_init``; when left out 3, or ``t_init`` where that is higher.
    """

    range: ClassVar[str] = "manual"

    def __init__(self, policy: str, t_init: object = None, t_min: object = None, t_max: object = None) -> None:
        start = check_temperature(policy, "t_init", 3.0 if t_init is None else t_init)
        floor, ceiling = 1.0 if t_min is None else t_min, max(3.0, start) if t_max is None else t_max
        self.t_init, self.t_min, self.t_max = check_range(policy, start, floor, ceiling)

    @property
    def in_force(self) -> tuple[float, float, float]:
        """(t_init, t_min, t_max), as given."""
        return self.t_init, self.t_min, self.t_max


class AutoRange(TemperatureRange):
    """The range at which the teacher offers so many tokens: ``range: auto``.

    The policy runs at T = 1 until it is solved, which is after the first step with finite statistics.

    Args:
        policy: its name, for messages.
        support_max: tokens on offer at t_init = t_max; 50 when left out, above ``support_min``.
        support_min: tokens on offer at t_min; 10 when left out, at least 1.
    """

    range: ClassVar[str] = "auto"
    state_fields: ClassVar[tuple[str, ...]] = ("solved_range",)

    def __init__(self, policy: str, support_max: object = None, support_min: object = None) -> None:
        low, high = 10.0 if support_min is None else support_min, 50.0 if support_max is None else support_max
        self.support_min = check_between(policy, "support_min", low, SUPPORT)
        self.support_max = check_number(
            policy, "support_max", high, low=self.support_min, high=math.inf, low_open=True
        )
        self.solved_range: list[float] = []  # [t_max, t_min], once they are known

    @property
    def in_force(self) -> tuple[float, float, float]:
        """(t_init, t_min, t_max): all of them 1 until they are solved."""
        high, low = self.solved_range or (_AUTO_START, _AUTO_START)
        return high, low, high

    def check_classes(self, classes: int) -> None:
        """Refuse supports that so many classes cannot give.

        Raises:
            UserError: there are two classes, or a support is not below their number.
        """
        if classes <= 2:
            raise UserError(
                f"temperature.range: got 'auto' over {classes} classes, where the effective support is between 1 and 2 at "
                "any T; expected range: manual with t_init and t_min"
            )
        for option, support in self._supports():
            if support >= classes:
                raise UserError(
                    f"temperature.{option}: got {support:g}, but teacher and student share {classes:,} classes, and the "
                    f"effective support stays below their number; expected less than {classes:,}"
                )

    @property
    def observes(self) -> bool:  # type: ignore[override]
        """Until the range is solved."""
        return not self.solved_range

    def observe(self, teacher_logits: Tensor) -> list[Tensor]:
        """The entropies of ``grid_entropies``, ``[[C, 19]]``, until the range is solved; later steps pay nothing."""
        return [grid_entropies(teacher_logits)] if self.observes else []

    def end_step(self, stats: StepStats) -> None:
        """Solve the range from the mean entropies of the first step.

        Raises:
            UserError: the teacher does not offer so many, or so few, tokens at any temperature of the grid.
        """
        entropies = stats.observed[-len(SUPPORT_GRID) :]
        # One step suffices unless its statistics are non-finite.
        if self.solved_range or len(entropies) < len(SUPPORT_GRID) or not all(map(math.isfinite, entropies)):
            return
        for option, support in self._supports():
            if not entropies[0] <= math.log(support) <= entropies[-1]:
                raise UserError(
                    f"temperature.{option}: got {support:g}, but in the first step this teacher offers from "
                    f"{math.exp(entropies[0]):.4g} tokens (T = {SUPPORT_GRID[0]:g}) to {math.exp(entropies[-1]):.4g} "
                    f"(T = {SUPPORT_GRID[-1]:g}); expected a number between the two, or range: manual with t_init and "
                    "t_min",
                    everywhere=True,  # the statistics of a step are the same on all processes
                )
        self.solved_range = [temperature_for(support, entropies) for _, support in self._supports()]

    def _supports(self) -> tuple[tuple[str, float], ...]:
        return ("support_max", self.support_max), ("support_min", self.support_min)


def temperature_range(
    policy: str, kind: str, limits: Sequence[object], supports: Sequence[object]
) -> TemperatureRange:
    """The range that the options of a policy ask for.

    Args:
        policy: its name, for messages.
        kind: ``manual`` or ``auto``.
        limits: t_init, t_min, t_max; None where left out, as all of them have to be with ``auto``.
        supports: support_max, support_min; None where left out, as both have to be with ``manual``.

    Raises:
        UserError: an option that belongs to the other kind, or is out of range.
    """
    manual = check_choice("range", kind, get_args(RangeKind)) == "manual"
    expected = "or range 'auto'" if manual else "support_max and support_min set the range"
    options = ("support_max", "support_min") if manual else ("t_init", "t_min", "t_max")
    for option, value in zip(options, supports if manual else limits, strict=True):
        if value is not None:
            raise UserError(
                f"temperature.{option}: got {value!r} with range '{kind}', expected it left out"
                f"{', ' if manual else ': '}{expected}"
            )
    return ManualRange(policy, *limits) if manual else AutoRange(policy, *supports)


def grid_entropies(teacher_logits: Tensor) -> Tensor:
    """Entropy (nats) of softmax(z_t / T) for each T of ``SUPPORT_GRID``, ``[C, V] -> [C, 19]``; in every row it rises."""
    z = teacher_logits.detach()
    columns = [torch.special.entr(torch.softmax(z / t, -1)).sum(-1) for t in SUPPORT_GRID]
    return torch.stack(columns, -1)


def temperature_for(support: float, entropies: Sequence[float]) -> float:
    """The T at which exp(mean entropy) is ``support``, which must lie within what the grid has.

    A monotone cubic through the points (log T, H): harmonic means of neighbouring slopes (Fritsch and Butland 1984). It
    cannot overshoot where all rows melt at one temperature and H is nearly a step.

    Args:
        support: tokens on offer, from 1.
        entropies: the means over rows at the temperatures of ``SUPPORT_GRID``, rising.
    """
    entropy = math.log(support)
    # H rises with T; the first point above the entropy ends the piece that holds it.
    upper = next((k for k, value in enumerate(entropies) if value > entropy), len(entropies) - 1)
    low, high = entropies[upper - 1], entropies[upper]
    rises = [max(after - before, 0.0) for before, after in pairwise(entropies)]
    left, right = (_slope(rises, point) for point in (upper - 1, upper))
    # Hermite's cubic on [0, 1] rises with x: halving the interval finds the place, to the last bit and without a pole.
    first, last = 0.0, 1.0
    for _ in range(60):
        x = 0.5 * (first + last)
        cubic = low + x * (left + x * (3 * (high - low) - 2 * left - right + x * (left + right - 2 * (high - low))))
        first, last = (x, last) if cubic < entropy else (first, x)
    return float(SUPPORT_GRID[upper - 1] * (SUPPORT_GRID[upper] / SUPPORT_GRID[upper - 1]) ** last)


def _slope(rises: Sequence[float], point: int) -> float:
    """Slope dH per grid step at a point; at the ends that of the one neighbour."""
    before, after = rises[max(point - 1, 0)], rises[min(point, len(rises) - 1)]
    return 2.0 * before * after / (before + after) if before > 0.0 and after > 0.0 else 0.0
