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
an ordinary run ``batch`` is the plain cosine. Per token it is not: the tokens on which the student BEATS the teacher by
more than a nat fire (2 to 6 % of them in toy runs) and jump to t_max near -1, so the extra T goes where the student needs
it least; mean T is 1.53 to 1.57 where the cosine has 1.50. The code's rule fires for gap > 1, most just above gap = 2. Only
``gap`` rises smoothly with the gap: it equals the cosine at gap <= 0 and never passes T_init.

What the gap is averaged over decides where the momentum acts:

============  =====================================  ==============================================================
granularity   gap                                    temperature
============  =====================================  ==============================================================
``batch``     all labels of the last optimizer step  T <- m T + (1 - m) clip(target(S, gap))                (Eq. 8)
``sequence``  the labels of the row's sequence       T_i = clip(target(S_m, gap_i)), S_m <- m S_m + (1 - m) S
``token``     the row itself                         the same
============  =====================================  ==============================================================

A row has no temperature of the step before, so per row the schedule carries the momentum m and the gap acts at once: there
m only delays the cosine, by m / (1 - m) steps (9 at 0.9). In ``batch`` it delays T as well, by at most 0.037 over 1000 steps
of [3, 1], and smooths a noisy gap: at 20 % noise T scatters by 0.016 instead of 0.062.

With m = 0 and one gap for all rows the three granularities are the same function of (S, gap). Gaps that differ give other
levels, too: alpha bends at 0, below which a gap counts as 0, and is concave above. In a toy run with a mean gap of 0.39
nats (standard deviation 1.05 over tokens, a third of them below 0) mean alpha is 0.209 per token and 0.283 per batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.temperature._dts_parts import (
    RULES,
    SUPPORT_GRID,
    check_classes,
    check_limits,
    check_supports,
    grid_entropies,
    log_sharpness_ratio,
    mix,
    one_of,
    solve_range,
    targets,
)
from dts_hf.temperature._recorded_run import GapSource, check_length, step_at
from dts_hf.temperature.base import (
    RowStats,
    StepStats,
    TemperaturePolicy,
    Temperatures,
    check_number,
    check_whole,
    half_cosine,
)

Source: TypeAlias = str | Mapping[str, Any]

#: The first step of ``range: auto`` runs here: nothing is known of the teacher yet.
_AUTO_START = 1.0


class DTS(TemperaturePolicy):
    """T <- momentum T + (1 - momentum) clip(target(p, gap), t_min, t_max), once per optimizer step (Eq. 8).

    With ``granularity: batch``, the gap that drives step k is the one reported by ``end_step`` of step k - 1, and the
    first step runs at ``t_init``. Per row, the gap is the row's own and ``temperature`` is what the last step's mean gap
    would give; a row whose gap is non-finite gets the cosine.

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
            ``support_max`` and ``support_min``. A support that the teacher does not reach ends the run there; two classes
            and supports beyond the vocabulary are refused before it.
        support_max: tokens on offer at t_max, for ``range: auto``, 50 when left out; above ``support_min``.
        support_min: tokens on offer at t_min, for ``range: auto``, 10 when left out; at least 1.
        gap_source: ``measured``, or a control of the same length, ``batch`` only: ``{replay: RUN, order: ORDER}`` plays
            the gaps of a finished run, ``recorded`` as they came (when left out), ``permuted`` one by one, or in permuted
            ``blocks`` of ``block: STEPS`` (a twentieth of the run when left out).
        seed: for ``permuted`` and ``blocks``; no other random generator is touched.
    """

    name: ClassVar[str] = "dts"
    paper: ClassVar[str | None] = "arXiv 2511.13767"
    formula: ClassVar[str] = (
        "T <- m T + (1 - m) clip(t_init (S + (1 - S) a)), a = max(gap, 0) / (max(gap, 0) + 1), S = (1 + cos(pi p)) / 2"
    )
    use: ClassVar[str] = (
        "You want a falling temperature that waits while the student is far behind: `rule: gap`. Which run beside it shows "
        "what the gap is worth: see [Controls](#controls). `granularity: token` keeps the tokens warm on which the student "
        "is behind (`adakd` argues for the opposite), by one sampled label each; `sequence` does so by example, with less "
        "noise. `decoupled: true` where student and teacher differ in confidence (other families, very different sizes) "
        "and you do not need the student's own at T = 1: see [below](#what-decoupled-costs). `range: auto` where nothing "
        "is known of the teacher's logits: it asks for [tokens on offer](#tokens-on-offer) instead of temperatures."
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
        "replayed",
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
        gap_source: Source = "measured",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.rule = one_of("rule", rule, RULES)
        self.granularity = one_of("granularity", granularity, ("batch", "sequence", "token"))
        self.range = one_of("range", range, ("manual", "auto"))
        self.gap_source = gap_source
        self.source = GapSource.of(gap_source)
        if self.source is not None and self.granularity != "batch":
            raise UserError(
                f"temperature.gap_source: got a recorded run with granularity '{granularity}', expected granularity "
                "'batch'; a log has one gap for each step"
            )
        if not isinstance(decoupled, bool):
            raise UserError(f"temperature.decoupled: got {decoupled!r}, expected true or false")
        check_whole("epochs", epochs, 1, "a whole number from 1, or null for every step")
        check_whole("seed", seed, 0, "a whole number from 0")
        if seed is not None and (self.source is None or self.source.order == "recorded"):
            raise UserError(
                f"temperature.seed: got {seed}, but nothing is drawn; expected no seed, or a gap_source with order "
                "'permuted' or 'blocks'"
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
        self.replayed: list[float | None] = []  # the gap that acts at each step but the first, where a run is replayed

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
    def ends(self) -> tuple[float, ...]:
        return self._limits[:2]

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

    def check_classes(self, classes: int) -> None:
        """
        Raises:
            UserError: ``range: auto`` over two classes, or with a support that is not below their number.
        """
        if self.support_max is not None and self.support_min is not None:
            check_classes(self.support_max, self.support_min, classes)

    def begin_run(self, steps: int | None = None) -> None:
        """Read the gaps that are replayed, unless a checkpoint has brought them.

        Raises:
            UserError: see ``read_trace`` and ``check_length``.
        """
        if self.source is None:
            return
        if not self.replayed:
            self.replayed = self.source.gaps(self.seed or 0)
        check_length("gap_source.replay", self.source.replay, len(self.replayed) + 1, steps)

    def begin_step(self, progress: float) -> None:
        super().begin_step(progress)
        if not self.started:  # no gap has been seen yet: the first step runs at t_init
            self.started = True
            return
        schedule = half_cosine(self._staircase(self.progress))
        self.schedule = mix(self.momentum, self.schedule, schedule)
        batch = self.granularity == "batch"
        t_init = self._limits[0]
        if batch:
            self.cosine_value = mix(self.momentum, self.cosine_value, self._clip(t_init * schedule))
        else:
            self.cosine_value = self._clip(t_init * self.schedule)
        gap = self._acting_gap()
        if not math.isfinite(gap):  # it says nothing: keep T, and count it so that the log shows it
            self.ignored_gaps += 1
            return
        if batch:
            self.value = mix(self.momentum, self.value, self._clip(self.target(schedule, gap)))
        else:
            self.value = self._clip(self.target(self.schedule, gap))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Temperatures of one chunk; per row, or decoupled per row, they are ``[C, 1]``.

        Raises:
            ValueError: granularity ``sequence`` without ``rows.sequence_gap``, or a run to replay before ``begin_run``.
        """
        if self.source is not None and not self.replayed:
            raise ValueError("dts: the run to replay was not read yet; call begin_run before the first step")
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
        """
        Raises:
            UserError: ``range: auto``, and the teacher does not reach a support.
        """
        self.gap = stats.gap
        observed = stats.observed
        if self.decoupled and self.granularity == "batch" and observed:
            if math.isfinite(observed[0]):
                self.log_ratio = observed[0]
            observed = observed[1:]
        # One step suffices unless its statistics are non-finite.
        usable = len(observed) == len(SUPPORT_GRID) and all(map(math.isfinite, observed))
        if self.range == "auto" and not self.solved_range and usable:
            assert self.support_max is not None and self.support_min is not None  # range is auto
            self.solved_range = solve_range(self.support_max, self.support_min, observed)
            self.value = self.cosine_value = self.solved_range[0]

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
        """The gap of the last step, or what a recorded run puts in its place."""
        if not self.replayed:
            return self.gap
        gap = self.replayed[max(step_at(self.progress, len(self.replayed) + 1), 1) - 1]
        return math.nan if gap is None else gap

    def _clip(self, target: float) -> float:
        _, low, high = self._limits
        return min(max(target, low), high)

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
