"""CIST (arXiv 2605.20357), our reading: every row of each model is brought to the same height of its largest logit."""

from __future__ import annotations

import functools
import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from dts_hf.errors import UserError
from dts_hf.registry import Between, PositiveFloat
from dts_hf.temperature.base import (
    RowStats,
    StepStats,
    TemperaturePolicy,
    Temperatures,
    check_choice,
    check_temperature,
)
from dts_hf.temperature.parts.logit_statistics import FLAT, LogitSummary, sharpness

Factor = Literal["teacher", "product"]
FACTORS: tuple[Factor, ...] = ("teacher", "product")
#: Tokens on offer where nobody says; over few classes their square root is less.
_SUPPORT = 5.0


class CIST(TemperaturePolicy):
    """T_t = m_t / rho_t, T_s = m_s / rho_s per token, with m = max z - mean z; the loss is T_t^2 rho_t / rho_s D.

    Our reading: the abstract says that the entropy of the targets hangs on the largest logit over T, and that each sample
    and each model has a temperature of its own. Here the largest logit is taken above the mean, because a softmax does not
    see a shift. After division it is rho in every row, so sure and unsure rows of the teacher are about equally soft. The
    paper also weighs samples by the teacher's confidence and the student's difficulty; that is not part of this.

    **The scale of the student.** Its T_s grows with its logits, so D does not depend on their scale, and does not push it.
    The gradient flows through m_s: it is that of the loss that is reported. With ``factor: product`` the factor is T_t T_s,
    the natural reading, and moves with the student: as long as D is not 0 its logits are paid for being small, and at a
    kd_ratio of 1 nothing holds against it. ``teacher``, the default, has the teacher's m_t in the place of m_s in the
    factor: the same number where both are equally sharp, and no such force.

    **rho** sets how soft the targets are; the paper's number is for image classes and could not be read. ``support`` gives
    it as tokens on offer, exp of the entropy of a row of V tokens with one peak over an even rest: 5 tokens of 49,152 are
    rho = 12.8. The rest of a real row is not even, so the teacher offers more than that: `effective_support` in the log
    tells, and is what to tune by.

    A row with m of 0.001 or less has no largest logit and runs at T = 1.

    Args:
        rho_t: the teacher's largest logit above the mean, over T_t; by ``support`` when left out.
        rho_s: the student's; ``rho_t`` when left out.
        support: tokens on offer, above 1 and below V; when left out 5, or the square root of V where that is less. Not
            beside ``rho_t``.
        factor: ``teacher`` for T_t^2 rho_t / rho_s, ``product`` for T_t T_s.

    Raises:
        UserError: an option is out of range, or ``support`` stands beside ``rho_t``.
    """

    name = "cist"
    reads = "summary"
    any_text = True
    without_kernels = "is differentiated through the student's largest logit"
    paper = "arXiv 2605.20357"
    formula = "T_t = m_t / rho_t, T_s = m_s / rho_s, m = max z - mean z, factor T_t^2 rho_t / rho_s, per token"
    use = (
        "To compare: our reading of a method for targets of equal entropy. The student should learn the order of the words, "
        "not the scale of the logits; keep cross-entropy beside it, which alone sets that scale."
    )
    cost = "2 reading passes per model (maximum, mean), and 4 for the gradient through m_s; on a GPU the PyTorch road"
    state_fields = ("mean",)

    def __init__(
        self,
        rho_t: PositiveFloat | None = None,
        rho_s: PositiveFloat | None = None,
        support: Annotated[float, Between(low=1.0, ends="high")] | None = None,
        factor: Factor = "teacher",
    ) -> None:
        super().__init__()
        self.rho_t = None if rho_t is None else check_temperature(self.name, "rho_t", rho_t)
        self.rho_s = None if rho_s is None else check_temperature(self.name, "rho_s", rho_s)
        self.support = None if support is None else self.checked("support", support)
        if self.rho_t is not None and self.support is not None:
            raise UserError(
                f"temperature.support: got {support!r} beside rho_t {rho_t!r}, expected one of them: each says how soft the "
                "teacher's targets are"
            )
        self.factor = check_choice("factor", factor, FACTORS)
        self.mean = 1.0

    @property
    def temperature(self) -> float:
        """The mean T_s of the last optimizer step (1 before the first)."""
        return self.mean

    def check_classes(self, classes: int) -> None:
        """Refuse a support that so many classes cannot give.

        Raises:
            UserError: ``support`` is not below their number.
        """
        super().check_classes(classes)
        if self.support is not None and self.support >= classes:
            raise UserError(
                f"temperature.support: got {self.support:g} over {classes} classes, expected a number above 1 and below that"
            )

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give each row its two temperatures, by the largest logits.

        Args:
            student_logits: ``[C, V]``.
            teacher_logits: ``[C, V]``.
            rows: not read.

        Returns:
            T_s and T_t, each ``[C, 1]``; ``scale`` ``[C, 1]``, None with ``factor: product``; ``peaked`` ``[C, 1]``, the
            rows where the loss takes the derivative through m_s along; ``observed``, T_s ``[C, 1]``.
        """
        rho_t, rho_s = self.heights(teacher_logits.shape[-1])
        student, has_peak = _over(student_logits, rho_s)
        teacher, _ = _over(teacher_logits, rho_t)
        scale = teacher.square() * (rho_t / rho_s) if self.factor == "teacher" else None
        return Temperatures(student, teacher, scale=scale, observed=student, peaked=has_peak)

    def heights(self, classes: int) -> tuple[float, float]:
        """rho_t and rho_s in force over so many classes."""
        rho_t = self.rho_t
        if rho_t is None:
            rho_t = height_of(min(_SUPPORT, math.sqrt(classes)) if self.support is None else self.support, classes)
        return rho_t, rho_t if self.rho_s is None else self.rho_s

    def end_step(self, stats: StepStats) -> None:
        """Keep the mean T_s, for the log alone."""
        if stats.observed and math.isfinite(stats.observed[0]) and stats.observed[0] > 0.0:
            self.mean = stats.observed[0]


@functools.lru_cache
def height_of(support: float, classes: int) -> float:
    """Max - mean of logits with one peak over an even rest whose effective support is ``support``.

    Args:
        support: exp of the entropy, above 1 and below ``classes``.
        classes: V; over a single one there is no peak, and the answer is 1.
    """
    if classes < 2:
        return 1.0
    rest, low, high = classes - 1, 0.0, 50.0 + math.log(classes)  # of the peak above the others
    for _ in range(80):
        peak = 0.5 * (low + high)
        others = rest * math.exp(-peak)
        # H = log(1 + n e^-g) + g n e^-g / (1 + n e^-g), falling in g
        if math.log1p(others) + peak * others / (1.0 + others) > math.log(support):
            low = peak
        else:
            high = peak
    return high * rest / classes


def _over(logits: Tensor | LogitSummary, rho: float) -> tuple[Tensor, Tensor]:
    """M / rho of each row, 1 where it is flat, and which rows are not, ``[C, V] -> [C, 1]`` each."""
    height = sharpness(logits.detach())
    has_peak = height > FLAT
    return torch.where(has_peak, height / rho, 1.0), has_peak
