"""A temperature from the teacher's largest standardised logit, our reading of arXiv 2503.09030."""

from __future__ import annotations

import math

from torch import Tensor

from dts_hf.temperature.base import RowStats, StepStats, TemperaturePolicy, Temperatures
from dts_hf.temperature.parts.logit_statistics import deviation_of, sharpness


class MaxLogit(TemperaturePolicy):
    """T_i = max_k z~_t with z~ the z-scored logits, shared by both models per token; the loss is T_i^2 D.

    Our reading: the paper says that T depends only on the teacher's maximum after standardisation. Whether it is taken
    per sample or per batch we could not verify, because the body of the authors' helper for T is not to be had; their
    DistillKL and MLKD multiply by T^2 inside the sum over samples, with the line for a single T commented out, which
    speaks for per sample, and this takes it per token. On the logits themselves T_t = T_i std(z_t) = max z_t - mean
    z_t, and T_s = T_i std(z_s). The authors name language as a risk: they assume one strong peak, and the largest of
    50k z-scores is above 4 even for normally distributed logits, which flattens the targets.

    The gradient flows through the student's standard deviation: the soft loss does not depend on the scale of the
    student's logits, and does not push it. (Up to version 0.1.0 the deviation was held constant.) A row with a deviation
    of 0.001 or less has none, and counts as one with deviation 1.
    """

    name = "max_logit"
    reads = "summary"
    any_text = True
    paper = "arXiv 2503.09030"
    formula = "T_i = max_k (z_t - mean z_t) / std(z_t); T_t = T_i std(z_t), T_s = T_i std(z_s), factor T_i^2"
    use = (
        "To compare: our reading of a method made for image classes. Expect very high temperatures over a large "
        "vocabulary."
    )
    cost = (
        "4 passes per model (mean, centring, square, sum), 2 more over the teacher's logits, and 7 for the gradient "
        "through the student's deviation; on a CPU 5 and 3 % of the loss"
    )
    state_fields = ("mean",)

    def __init__(self) -> None:
        super().__init__()
        self.mean = 1.0

    @property
    def temperature(self) -> float:
        """The mean T_i of the last optimizer step (1 before the first)."""
        return self.mean

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give each row its two temperatures, T_i times the deviations of its logits.

        Args:
            student_logits: ``[C, V]``.
            teacher_logits: ``[C, V]``.
            rows: not read.

        Returns:
            T_s and T_t, each ``[C, 1]``; ``scale``, T_i^2 ``[C, 1]``; ``scale_free`` ``[C, 1]``, the rows whose student
            has a deviation: there the loss takes the derivative through std(z_s) along; ``observed``, T_i
            ``[C, 1]``.
        """
        student, has_deviation = deviation_of(student_logits)
        teacher, _ = deviation_of(teacher_logits)
        # A maximum is at least 1 / sqrt(V) deviations above the mean: the bound acts on flat rows alone.
        shared = (sharpness(teacher_logits.detach()) / teacher).clamp_(min=teacher_logits.shape[-1] ** -0.5)
        return Temperatures(
            student * shared, teacher * shared, scale=shared.square(), observed=shared, scale_free=has_deviation
        )

    def end_step(self, stats: StepStats) -> None:
        """Keep the mean T_i, for the log alone."""
        if stats.observed and math.isfinite(stats.observed[0]) and stats.observed[0] > 0.0:
            self.mean = stats.observed[0]
