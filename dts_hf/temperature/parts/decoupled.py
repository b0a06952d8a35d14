"""One temperature made two: T_s and T_t around T, so that student and teacher are equally sharp after division.

T_s = T sqrt(r) and T_t = T / sqrt(r) with r = k_s / k_t, so k_s / T_s = k_t / T_t and T_s T_t = T^2. k(z) = max z - mean z
is the statistic of DTKD (arXiv 2404.12711), two reading passes per model. r is kept within [1/4, 4], so T_s and T_t may
leave the range of T by a factor of 2. With granularity ``batch`` r is the geometric mean over the last step (1 in the
first), per row it is the row's own.
"""

from __future__ import annotations

import math

from torch import Tensor

from dts_hf.temperature.base import Mechanism, StepStats, check_flag
from dts_hf.temperature.parts.logit_statistics import FLAT, sharpness

#: The bound of log r.
MAX_LOG_RATIO = math.log(4.0)


class Decoupled(Mechanism):
    """The option ``decoupled``: whether student and teacher get their own temperatures.

    Args:
        decoupled: true or false; with false both get T.
        per_row: whether r is each row's own. Otherwise it is the geometric mean over the rows of the last optimizer step,
            1 in the first.
    """

    state_fields = ("log_ratio",)

    def __init__(self, decoupled: object, per_row: bool) -> None:
        self.decoupled, self.per_row = check_flag("decoupled", decoupled), per_row
        self.log_ratio = 0.0  # mean log r of the last step

    def split(self, t: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Split T into T_s and T_t.

        Args:
            t: ``[]`` or ``[C, 1]``.
            student_logits: ``[C, V]``.
            teacher_logits: ``[C, V]``.

        Returns:
            T_s, T_t and what ``end_step`` needs to know: columns ``[C, K]``, the first ones of ``observed``.
        """
        if not self.decoupled:
            return t, t, []
        log_ratio = log_sharpness_ratio(student_logits, teacher_logits)
        half = (log_ratio if self.per_row else log_ratio.new_full((), self.log_ratio)) / 2
        return t * half.exp(), t * (-half).exp(), [] if self.per_row else [log_ratio]

    def end_step(self, stats: StepStats) -> None:
        """Keep the mean log r of the step; one that is non-finite says nothing."""
        if self.decoupled and not self.per_row and stats.observed and math.isfinite(stats.observed[0]):
            self.log_ratio = stats.observed[0]


def log_sharpness_ratio(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Log r of each row, two ``[C, V] -> [C, 1]``, detached.

    DTKD uses max z in its code; on the logits of language models that has any sign, so it is centred here.
    """
    # Rows flatter than FLAT count as that flat: 0 / 0 has no ratio, and rounding would invent one.
    log_s, log_t = (sharpness(z.detach()).clamp(min=FLAT).log() for z in (student_logits, teacher_logits))
    # Infinite logits give inf - inf: no ratio, so T_s = T_t.
    return (log_s - log_t).nan_to_num(nan=0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
