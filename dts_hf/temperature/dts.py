"""The Dynamic Temperature Scheduler (DTS, arXiv 2511.13767): a cosine that listens to the teacher-student gap.

With gap = student CE - teacher CE in nats per label, and p the share of the run that is done:

    S(p)   = (1 + cos(pi p)) / 2                                                            (Eq. 4)
    target = T_init S(p), lifted by the gap: three named rules, parts/dts_rules.py          (Eq. 5 and 6)
    T     <- m T + (1 - m) clip(target, T_min, T_max), once per optimizer step              (Eq. 7 and 8)
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from dts_hf.registry import PositiveFloat
from dts_hf.temperature.base import Reads, RowStats, StepStats, TemperaturePolicy, Temperatures, half_cosine
from dts_hf.temperature.parts import dts_rules
from dts_hf.temperature.parts.auto_range import SUPPORT, RangeKind, temperature_range
from dts_hf.temperature.parts.decoupled import Decoupled
from dts_hf.temperature.parts.gap_source import SEED, GapSource, gap_source_of
from dts_hf.temperature.parts.granularity import Granularity, check_granularity, row_gaps


class DTS(TemperaturePolicy):
    """T <- momentum T + (1 - momentum) clip(target(p, gap), t_min, t_max), once per optimizer step (Eq. 8).

    Args:
        rule: ``paper``, ``code`` or ``gap``: how the gap lifts the target.
        t_init: temperature of the first step, 3 when left out; the paper has [8, 4] within an architecture, else [3, 1].
        t_min: floor, 1 when left out; above 0, because S(1) = 0 and without a floor the last steps would divide by zero.
        t_max: ceiling, at least ``t_init``; when left out 3, or ``t_init`` where that is higher.
        momentum: weight of the old temperature, in [0, 1); 0.9 in the paper.
        granularity: what the gap is averaged over: ``batch`` (all labels of one optimizer step), ``sequence`` or ``token``.
        epochs: a number makes progress a staircase of that many epochs, as published; else it moves with every step.
        decoupled: student and teacher get their own temperatures, by the ratio of their sharpnesses.
        range: ``manual``, or ``auto`` for the temperatures at which the teacher offers so many tokens.
        support_max: tokens on offer at t_init = t_max, for ``range: auto``; 50 when left out, above ``support_min``.
        support_min: tokens on offer at t_min, for ``range: auto``; 10 when left out, at least 1.
        gap_source: ``measured``; ``held_out``, or ``{held_out: {every: 50, rows: 64}}``, on held-out rows every so many
            steps; ``{replay: RUN, order: ORDER}`` for the gaps of a finished run. The last two with ``batch`` only.
        seed: for an ``order`` that permutes.
    """

    name = "dts"
    paper = "arXiv 2511.13767"
    formula = "T <- m T + (1 - m) clip(t_init (S + (1 - S) g / (g + 1))), g = max(gap, 0), S = (1 + cos(pi p)) / 2"
    use = (
        "You want a falling temperature that waits while the student is far behind: `rule: gap`. Which run beside it shows "
        "what the gap is worth: [Controls](#controls); when to take which option: [below](#the-options-of-dts)."
    )
    held: str | None = (
        "Per token and sequence T_i, through the gap of its rows; decoupled per row also k_s in the ratio r. (With `batch` "
        "T comes from the step before, decoupled or not: nothing is held.) Dropped are a second force of cross-entropy, "
        "which would lower the gap for the sake of T_i^2, and one through the student's largest logit, which would move its "
        "sharpness for the sake of r. Both would change the loss by its temperature alone."
    )
    cost = (
        "none; `sequence`: one log-sum-exp more per model; `decoupled`: 2 passes per model; `auto`: 19 softmaxes once"
    )
    state_fields = ("value", "cosine_value", "schedule", "started")

    def __init__(
        self,
        rule: dts_rules.Rule = "gap", t_init: PositiveFloat | None = None, t_min: PositiveFloat | None = None,
        t_max: PositiveFloat | None = None, momentum: Annotated[float, dts_rules.MOMENTUM] = 0.9,
        granularity: Granularity = "batch", epochs: Annotated[int, dts_rules.EPOCHS] | None = None,
        decoupled: bool = False, range: RangeKind = "manual", support_max: Annotated[float, SUPPORT] | None = None,
        support_min: Annotated[float, SUPPORT] | None = None, gap_source: GapSource = "measured",
        seed: Annotated[int, SEED] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rule, self.granularity = dts_rules.check_rule(rule), check_granularity(granularity)
        self.per_row = granularity != "batch"
        self.gaps = gap_source_of(gap_source, seed, granularity)
        self.decoupling = Decoupled(decoupled, self.per_row)
        self.epochs, self.momentum = dts_rules.check_epochs(epochs), dts_rules.check_momentum(momentum)
        self.limits = temperature_range(self.name, range, (t_init, t_min, t_max), (support_max, support_min))
        self.mechanisms = (self.gaps, self.decoupling, self.limits)
        self.held = type(self).held if self.per_row else None
        self.value = self.cosine_value = self.limits.in_force[0]
        self.schedule, self.started = 1.0, False

    @property
    def temperature(self) -> float:
        """T; per row what the mean gap of the last step would give."""
        return self.value

    @property
    def cosine(self) -> float | None:
        """The same scheduler without the gap: equal range, clipping and momentum, so that only the gap differs."""
        return self.cosine_value

    @property
    def ends(self) -> tuple[float, ...]:
        """t_init and t_min in force."""
        return self.limits.in_force[:2]

    @property
    def highest(self) -> float | None:
        """t_max; None while ``range: auto`` is unsolved, and with ``decoupled``, whose ratio the logits make."""
        return None if self.limits.observes or self.decoupling.decoupled else self.limits.in_force[2]

    @property
    def any_text(self) -> bool:  # type: ignore[override]
        """Where the gaps are not those of the rows that are trained on."""
        return bool(self.gaps.foreign)

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        """The gap of each row with a granularity of rows; the logits while ``range: auto`` is unsolved."""
        if self.limits.observes:
            return "logits"
        if self.decoupling.decoupled:
            return "summary"
        return "rows" if self._by_row else "nothing"

    @property
    def needs_sequence_gap(self) -> bool:
        """Whether ``rows.sequence_gap`` is read."""
        return self.granularity == "sequence" and not self.holding

    @property
    def _by_row(self) -> bool:
        """Whether each row has a temperature of its own in this step."""
        return self.per_row and not self.holding

    def begin_step(self, progress: float) -> None:
        """Eq. 4 to 8, with the gap of the step before; the first step has none and runs at t_init."""
        super().begin_step(progress)
        if not self.started:
            self.started = True
            return
        # A row has no temperature of the step before: there the schedule carries the momentum in its place.
        m_schedule, m = (self.momentum, 0.0) if self.per_row else (0.0, self.momentum)
        schedule = half_cosine(dts_rules.staircase(self.progress, self.epochs, self.rule))
        self.schedule = dts_rules.moving_average(m_schedule, self.schedule, schedule)
        self.cosine_value = dts_rules.moving_average(m, self.cosine_value, self._target(0.0))
        gap = self.gaps.next_gap(self.progress)
        if gap is not None:  # else it was non-finite: T stays
            self.value = dts_rules.moving_average(m, self.value, self._target(gap))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give T, or each row its own by its own gap (Eq. 5 to 7); with ``decoupled`` two of them.

        Args:
            student_logits: ``[C, V]``.
            teacher_logits: ``[C, V]``.
            rows: cross-entropies of the same rows, ``[C]``.

        Returns:
            ``[]``, or ``[C, 1]`` per row.

        Raises:
            ValueError: a run to replay before ``begin_run``; granularity ``sequence`` without ``rows.sequence_gap``.
        """
        self.gaps.check_read(self.name)
        t = torch.full((), self.value, dtype=student_logits.dtype, device=student_logits.device)
        if self._by_row:
            t = self._targets(row_gaps(self.granularity, rows)).to(t.dtype).unsqueeze(-1)
        student, teacher, observed = self.decoupling.split(t, student_logits, teacher_logits)
        observed += self.limits.observe(teacher_logits)
        return Temperatures(student, teacher, observed=torch.cat(observed, -1) if observed else None)

    def end_step(self, stats: StepStats) -> None:
        """Keep the gap for the next step; a range that was solved now starts the schedule at its t_init."""
        before = self.limits.in_force
        super().end_step(stats)
        if self.limits.in_force != before:
            self.value = self.cosine_value = self.limits.in_force[0]

    def _target(self, gap: float) -> float:
        """Eq. 5 to 7 at the present S, for one gap in nats."""
        return float(self._targets(torch.tensor(gap, dtype=torch.float64)))

    def _targets(self, gap: Tensor) -> Tensor:
        """Eq. 5 to 7 at the present S, for gaps of any shape."""
        t_init, t_min, t_max = self.limits.in_force
        return dts_rules.target(self.rule, t_init, self.schedule, gap).clamp(t_min, t_max)
