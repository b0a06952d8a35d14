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

What the gap is averaged over decides where the momentum acts:

============  =====================================  ==============================================================
granularity   gap                                    temperature
============  =====================================  ==============================================================
``batch``     all labels of the last optimizer step  T <- m T + (1 - m) clip(target(S, gap))                (Eq. 8)
``sequence``  the labels of the row's sequence       T_i = clip(target(S_m, gap_i)), S_m <- m S_m + (1 - m) S
``token``     the row itself                         the same
============  =====================================  ==============================================================

A row has no temperature of the step before, so per row the schedule carries the momentum m and the gap acts at once.
With m = 0 and one gap for all rows the three granularities are the same function of (S, gap).
"""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.temperature._dts_parts import (
    RULES,
    SUPPORT_GRID,
    check_limits,
    check_supports,
    check_whole,
    draw_gap,
    grid_entropies,
    log_sharpness_ratio,
    one_of,
    remember_gap,
    solve_range,
    targets,
)
from dts_hf.temperature.base import (
    RowStats,
    StepStats,
    TemperaturePolicy,
    Temperatures,
    check_number,
    half_cosine,
)

logger = logging.getLogger(__name__)

#: The first step of ``range: auto`` runs here: nothing is known of the teacher yet.
_AUTO_START = 1.0


class DTS(TemperaturePolicy):
    """T <- momentum T + (1 - momentum) clip(target(p, gap), t_min, t_max), once per optimizer step (Eq. 8).

    With ``granularity: batch``, the gap that drives step k is the one reported by ``end_step`` of step k - 1, and the
    first step runs at ``t_init``. Per row, the gap is the row's own and ``temperature`` is what the last step's mean gap
    would give; a row whose gap is no number gets the cosine.

    Args:
        rule: ``paper``, ``code`` or ``gap`` (see the table above).
        t_init: temperature of the first step, 3 when left out; the paper's ranges are [8, 4] within one architecture,
            [3, 1] across.
        t_min: floor, 1 when left out; above 0 (S(1) = 0, so without a floor the last steps would divide by zero).
        t_max: ceiling, at least ``t_init``; when left out 3, or ``t_init`` where that is higher.
        momentum: weight of the old temperature, in [0, 1); 0.9 in the paper.
        granularity: what the gap is averaged over: ``batch`` (all labels of one optimizer step), ``sequence`` or
            ``token``.
        epochs: None lets progress move with every optimizer step; a number makes it a staircase of that many epochs,
            as published (``code`` counts epochs from one, so that its last epoch has S = 0).
        decoupled: student and teacher get their own temperatures, T_s = T sqrt(r) and T_t = T / sqrt(r), so that
            k_s / T_s = k_t / T_t. r = k_s / k_t, k(z) = max z - mean z (the statistic of DTKD, arXiv 2404.12711,
            centred), within [1/4, 4]; T_s T_t = T^2, and T_s, T_t may leave [t_min, t_max] by a factor of 2. ``batch``
            uses the geometric mean of r over the last step (1 in the first), per row r is the row's own.
        range: ``manual``, or ``auto``: the first step, at T = 1, measures the teacher's entropy at 19 temperatures from
            1/4 to 16; then t_init = t_max and t_min are those at which its effective support exp(mean H_T) is
            ``support_max`` and ``support_min``. A support out of reach gives the nearest end of [1/4, 16], and a
            warning.
        support_max: tokens on offer at t_max, for ``range: auto``; above ``support_min``.
        support_min: tokens on offer at t_min, for ``range: auto``; at least 1.
        gap_source: ``measured``, or ``shuffled``: the control that replaces the last step's gap by that of a step drawn
            uniformly from all so far (from a uniform sample of 1000 of them once there are more). It has the
            same gaps, but not when they happened. ``batch`` only.
        seed: for ``shuffled``; no other random generator is touched.
    """

    name: ClassVar[str] = "dts"
    paper: ClassVar[str | None] = "arXiv 2511.13767"
    formula: ClassVar[str] = (
        "T <- m T + (1 - m) clip(t_init (S + (1 - S) a)), a = max(gap, 0) / (max(gap, 0) + 1), S = (1 + cos(pi p)) / 2"
    )
    use: ClassVar[str] = (
        "You want a falling temperature that waits while the student is far behind: `rule: gap`. `cosine` with the same "
        "range shows what the gap is worth, `gap_source: shuffled` whether its timing matters, `constant` whether "
        "a schedule is needed at all. `granularity: token` keeps the tokens warm on which the student is behind (`adakd` "
        "argues for the opposite); `sequence` does so by example, with less noise. `decoupled: true` where student and "
        "teacher differ in confidence (other families, very different sizes). `range: auto` where nothing is known of "
        "the teacher's logits: it asks for tokens on offer instead of temperatures, and measures them in the first step."
    )
    held: str | None = (
        "Per token and sequence T_i, through the gap of its rows; decoupled per row also k_s in the ratio r. (With "
        "granularity `batch`, decoupled or not, T comes from the step before, and nothing is held.) Dropped are a second "
        "force of cross-entropy, which would lower the gap for the sake of T_i^2, and one through the student's largest "
        "logit, which would move its sharpness for the sake of r. Both would change the loss by its temperature alone."
    )
    cost: ClassVar[str] = (
        "none (batch, token); sequence: one more log-sum-exp of both models, and for a sequence longer than a chunk its "
        "logits a second time; decoupled: 2 reading passes per model (maximum, mean); range auto: 19 softmaxes "
        "of the teacher in the first step only"
    )
    state_fields: ClassVar[tuple[str, ...]] = (
        "value",
        "cosine_value",
        "schedule",
        "gap",
        "started",
        "ignored_gaps",
        "log_ratio",
        "solved_range",
        "range_notes",
        "remembered_gaps",
        "gaps_seen",
    )
    t_init: float | None
    t_min: float | None
    t_max: float | None
    support_max: float | None
    support_min: float | None

    def __init__(
        self,
        rule: str = "gap",
        t_init: float | None = None,
        t_min: float | None = None,
        t_max: float | None = None,
        momentum: float = 0.9,
        granularity: str = "batch",
        epochs: int | None = None,
        decoupled: bool = False,
        range: str = "manual",
        support_max: float | None = None,
        support_min: float | None = None,
        gap_source: str = "measured",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.rule = one_of("rule", rule, RULES)
        self.granularity = one_of("granularity", granularity, ("batch", "sequence", "token"))
        self.range = one_of("range", range, ("manual", "auto"))
        self.gap_source = one_of("gap_source", gap_source, ("measured", "shuffled"))
        if self.gap_source == "shuffled" and self.granularity != "batch":
            raise UserError(
                f"temperature.gap_source: got 'shuffled' with granularity '{granularity}', expected granularity 'batch'; "
                "which rows could trade gaps would depend on how the step was split"
            )
        if not isinstance(decoupled, bool):
            raise UserError(f"temperature.decoupled: got {decoupled!r}, expected true or false")
        check_whole("epochs", epochs, 1, "a whole number from 1, or null for every step")
        check_whole("seed", seed, 0, "a whole number from 0")
        if seed is not None and self.gap_source != "shuffled":
            raise UserError(
                f"temperature.seed: got {seed} with gap_source 'measured', which draws nothing; expected no seed, or "
                "gap_source 'shuffled'"
            )
        self.momentum = check_number(self.name, "momentum", momentum, low=0.0, high=1.0)
        if self.momentum == 1.0:
            raise UserError(
                "temperature.momentum: got 1, expected a number from 0 to below 1; at 1 T would never move"
            )
        self.epochs, self.decoupled, self.seed = epochs, decoupled, seed
        self.t_init, self.t_min, self.t_max = check_limits(self.range, t_init, t_min, t_max)
        self.support_max, self.support_min = check_supports(self.range, support_max, support_min)

        self.solved_range: list[float] = []  # [t_max, t_min] once ``range: auto`` knows them
        self.held = type(self).held if granularity != "batch" else None
        self.value = self.cosine_value = self._limits[0]
        self.schedule = 1.0  # S(p) with momentum
        self.gap = 0.0
        self.started = False
        self.ignored_gaps = 0
        self.log_ratio = 0.0  # mean log(k_s / k_t) of the last step
        self.range_notes: list[str] = []  # supports that no temperature reaches
        self.remembered_gaps: list[float] = []
        self.gaps_seen = 0

    @property
    def _limits(self) -> tuple[float, float, float]:
        """(t_init, t_min, t_max) in force."""
        if self.t_init is not None and self.t_min is not None and self.t_max is not None:
            return self.t_init, self.t_min, self.t_max
        if self.solved_range:
            high, low = self.solved_range
            return high, low, high
        return _AUTO_START, _AUTO_START, _AUTO_START

    @property
    def temperature(self) -> float:
        return self.value

    @property
    def cosine(self) -> float | None:
        """The same scheduler without the gap: equal range, clipping and momentum, so that only the gap differs."""
        return self.cosine_value

    @property
    def needs_sequence_gap(self) -> bool:
        return self.granularity == "sequence"

    def begin_step(self, progress: float) -> None:
        super().begin_step(progress)
        if not self.started:  # no gap has been seen yet: the first step runs at t_init
            self.started = True
            return
        schedule = half_cosine(self._staircase(self.progress))
        self.schedule = _mix(self.momentum, self.schedule, schedule)
        batch = self.granularity == "batch"
        t_init = self._limits[0]
        if batch:
            self.cosine_value = _mix(self.momentum, self.cosine_value, self._clip(t_init * schedule))
        else:
            self.cosine_value = self._clip(t_init * self.schedule)
        if not math.isfinite(self.gap):  # it says nothing: keep T, and count it so that the log shows it
            self.ignored_gaps += 1
            return
        if batch:
            self.value = _mix(self.momentum, self.value, self._clip(self.target(schedule, self._acting_gap())))
        else:
            self.value = self._clip(self.target(self.schedule, self.gap))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Temperatures of one chunk; per row, or decoupled per row, they are ``[C, 1]``.

        Raises:
            ValueError: granularity ``sequence`` without ``rows.sequence_gap``.
        """
        batch = self.granularity == "batch"
        middle = torch.full((), self.value, dtype=student_logits.dtype, device=student_logits.device)
        if not batch:
            middle = self._row_temperatures(rows).to(student_logits.dtype).unsqueeze(-1)
        student = teacher = middle
        observed = []
        if self.decoupled:
            log_ratio = log_sharpness_ratio(student_logits, teacher_logits).unsqueeze(-1)
            observed += [log_ratio] if batch else []
            half = (log_ratio.new_full((), self.log_ratio) if batch else log_ratio) / 2
            student, teacher = middle * half.exp(), middle * (-half).exp()
        if self.range == "auto" and not self.solved_range:
            observed.append(grid_entropies(teacher_logits))
        return Temperatures(student, teacher, observed=torch.cat(observed, -1) if observed else None)

    def counters(self) -> dict[str, int]:
        return {"ignored_gaps": self.ignored_gaps}

    def end_step(self, stats: StepStats) -> None:
        self.gap = stats.gap
        if self.gap_source == "shuffled" and math.isfinite(self.gap):
            remember_gap(self.remembered_gaps, self.gap, self.gaps_seen, self.seed or 0)
            self.gaps_seen += 1
        observed = stats.observed
        if self.decoupled and self.granularity == "batch" and observed:
            if math.isfinite(observed[0]):
                self.log_ratio = observed[0]
            observed = observed[1:]
        # One step is enough, unless it was one that says nothing.
        usable = len(observed) == len(SUPPORT_GRID) and all(map(math.isfinite, observed))
        if self.range == "auto" and not self.solved_range and usable:
            assert self.support_max is not None and self.support_min is not None  # range is auto
            self.solved_range, self.range_notes = solve_range(self.support_max, self.support_min, observed)
            self.value = self.cosine_value = self.solved_range[0]
            for note in self.range_notes:
                logger.warning(note)

    def target(self, schedule: float, gap: float) -> float:
        """The target before clipping and momentum, for ``schedule`` = S(p) in [0, 1] and a finite gap in nats."""
        return float(targets(self.rule, self._limits[0], schedule, torch.tensor(gap, dtype=torch.float64)))

    def _row_temperatures(self, rows: RowStats) -> Tensor:
        """``[C]``: the rule around the smoothed schedule, with the gap of each row."""
        gap = rows.sequence_gap if self.granularity == "sequence" else rows.student_ce - rows.teacher_ce
        if gap is None:
            raise ValueError("dts, granularity 'sequence': the loss gave no rows.sequence_gap")
        t_init, low, high = self._limits
        gap = gap.detach()
        rule = targets(self.rule, t_init, self.schedule, gap)
        return torch.where(gap.isfinite(), rule, t_init * self.schedule).clamp(low, high)

    def _acting_gap(self) -> float:
        if self.gap_source == "shuffled" and self.remembered_gaps:
            return draw_gap(self.remembered_gaps, self.gaps_seen, self.seed or 0)
        return self.gap

    def _clip(self, target: float) -> float:
        _, low, high = self._limits
        return min(max(target, low), high)

    def _staircase(self, progress: float) -> float:
        if self.epochs is None:
            return progress
        epoch = min(math.floor(progress * self.epochs + 1e-9), self.epochs - 1)
        return (epoch + (1 if self.rule == "code" else 0)) / self.epochs

    def state(self) -> dict[str, Any]:
        # JSON has no NaN: a gap that was not a number is stored as null. Lists are copied: ours go on growing.
        state = {key: list(value) if isinstance(value, list) else value for key, value in super().state().items()}
        return {**state, "gap": self.gap if math.isfinite(self.gap) else None}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.gap = math.nan if state["gap"] is None else state["gap"]
        for field in ("solved_range", "range_notes", "remembered_gaps"):
            setattr(self, field, list(state[field]))


def _mix(momentum: float, old: float, new: float) -> float:
    mixed = momentum * old + (1.0 - momentum) * new
    # A mean lies between its ends; rounding may put it one ulp outside (0.9 * 3 + 0.1 * 3 > 3).
    return min(max(mixed, min(old, new)), max(old, new))
