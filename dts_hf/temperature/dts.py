"""The Dynamic Temperature Scheduler (DTS, arXiv 2511.13767): a cosine that listens to the teacher-student gap.

Three named rules, because the paper's equation, the authors' released code and the paper's prose are three different
things. With d the argument of alpha, alpha = d / (d + 1 + eps) and S(p) = (1 + cos(pi p)) / 2:

=========  ==================  ======  ==========================================================================
rule       d                   eps     target temperature
=========  ==================  ======  ==========================================================================
``paper``  gap                 1e-8    T_init S alpha if alpha > 1 else T_init S                       (Eq. 5-7)
``code``   -gap                1e-4    the same, and an alpha above 2 becomes 1.35      (the released LM scripts)
``gap``    max(gap, 0)         0       T_init (S + (1 - S) alpha)                       (what the prose promises)
=========  ==================  ======  ==========================================================================

gap = student CE - teacher CE. The paper's rule needs gap < -1 to fire (a student one nat BETTER than its teacher), so in
an ordinary run it is the plain cosine. The code's rule fires for gap > 1, most just above gap = 2. Only ``gap``
rises smoothly with the gap: it equals the cosine at gap <= 0 and never passes T_init.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from dts_hf.errors import UserError, nearest
from dts_hf.temperature.base import StepStats, TemperaturePolicy, check_number, check_range, half_cosine

RULES = ("paper", "code", "gap")
_EPS = {"paper": 1e-8, "code": 1e-4, "gap": 0.0}
_CODE_CAP, _CODE_CAPPED_ALPHA = 2.0, 1.35


class DTS(TemperaturePolicy):
    """T <- momentum T + (1 - momentum) clip(target(p, gap), t_min, t_max), once per optimizer step (Eq. 8).

    The gap that drives step k is the one reported by ``end_step`` of step k - 1; the first step runs at ``t_init``.

    Args:
        rule: ``paper``, ``code`` or ``gap`` (see the table above).
        t_init: temperature of the first step; the paper's ranges are [8, 4] within one architecture, [3, 1] across.
        t_min: floor, above 0 (S(1) = 0, so without a floor the last steps would divide by zero).
        t_max: ceiling, at least ``t_init``.
        momentum: weight of the old temperature, in [0, 1); 0.9 in the paper.
        granularity: what the gap is averaged over; ``batch`` = all labels of one optimizer step.
        epochs: None lets progress move with every optimizer step; a number makes it a staircase of that many epochs,
            as published (``code`` counts epochs from one, so that its last epoch has S = 0).
    """

    name: ClassVar[str] = "dts"
    paper: ClassVar[str | None] = "arXiv 2511.13767"
    state_fields: ClassVar[tuple[str, ...]] = ("value", "cosine_value", "gap", "started", "ignored_gaps")

    def __init__(
        self,
        rule: str = "gap",
        t_init: float = 3.0,
        t_min: float = 1.0,
        t_max: float = 3.0,
        momentum: float = 0.9,
        granularity: str = "batch",
        epochs: int | None = None,
    ) -> None:
        super().__init__()
        if rule not in RULES:
            raise UserError(
                f"temperature.rule: got {rule!r}, expected one of {', '.join(RULES)}.{nearest(str(rule), RULES)}"
            )
        if granularity != "batch":
            raise UserError(f"temperature.granularity: got {granularity!r}, expected 'batch'")
        if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
            raise UserError(
                f"temperature.epochs: got {epochs!r}, expected a whole number from 1, or null for every step"
            )
        self.rule = rule
        self.t_init, self.t_min, self.t_max = check_range(self.name, t_init, t_min, t_max)
        self.momentum = check_number(self.name, "momentum", momentum, low=0.0, high=1.0)
        if self.momentum == 1.0:
            raise UserError(
                "temperature.momentum: got 1, expected a number from 0 to below 1; at 1 T would never move"
            )
        self.epochs = epochs
        self.value = self.cosine_value = self.t_init
        self.gap = 0.0
        self.started = False
        self.ignored_gaps = 0

    @property
    def temperature(self) -> float:
        return self.value

    @property
    def cosine(self) -> float | None:
        """The same scheduler without the gap: equal range, clipping and momentum, so that only the gap differs."""
        return self.cosine_value

    def begin_step(self, progress: float) -> None:
        super().begin_step(progress)
        if not self.started:  # no gap has been seen yet: the first step runs at t_init
            self.started = True
            return
        schedule = half_cosine(self._staircase(self.progress))
        self.cosine_value = self._smooth(self.cosine_value, self.t_init * schedule)
        if math.isfinite(self.gap):
            self.value = self._smooth(self.value, self.target(schedule, self.gap))
        else:  # a NaN or infinite gap says nothing: keep T, and count it so that the log shows it
            self.ignored_gaps += 1

    def end_step(self, stats: StepStats) -> None:
        self.gap = stats.gap

    def target(self, schedule: float, gap: float) -> float:
        """The target before clipping and momentum, for ``schedule`` = S(p) in [0, 1] and a finite gap in nats."""
        if self.rule == "gap":
            excess = max(gap, 0.0)
            return self.t_init * (schedule + (1.0 - schedule) * (excess / (excess + 1.0)))
        signed_gap = gap if self.rule == "paper" else -gap
        denominator = signed_gap + 1.0 + _EPS[self.rule]
        # Exactly on the pole alpha has no sign: read it from below, where the rule does not fire.
        alpha = signed_gap / denominator if denominator != 0.0 else -math.inf
        if alpha <= 1.0:
            return self.t_init * schedule
        if self.rule == "code" and alpha > _CODE_CAP:
            alpha = _CODE_CAPPED_ALPHA
        return self.t_init * schedule * alpha

    def _smooth(self, old: float, target: float) -> float:
        clipped = min(max(target, self.t_min), self.t_max)
        mixed = self.momentum * old + (1.0 - self.momentum) * clipped
        # A mean lies between its ends; rounding may put it one ulp outside (0.9 * 3 + 0.1 * 3 > 3).
        return min(max(mixed, min(old, clipped)), max(old, clipped))

    def _staircase(self, progress: float) -> float:
        if self.epochs is None:
            return progress
        epoch = min(math.floor(progress * self.epochs + 1e-9), self.epochs - 1)
        return (epoch + (1 if self.rule == "code" else 0)) / self.epochs

    def state(self) -> dict[str, Any]:
        # JSON has no NaN: a gap that was not a number is stored as null.
        return {**super().state(), "gap": self.gap if math.isfinite(self.gap) else None}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.gap = math.nan if state["gap"] is None else state["gap"]
