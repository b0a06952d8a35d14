"""A temperature from the teacher's largest standardised logit, our reading of arXiv 2503.09030."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from dts_hf.temperature.base import RowStats, StepStats, TemperaturePolicy, Temperatures
from dts_hf.temperature.spread import EPS, sharpness, standard_deviation


class MaxLogit(TemperaturePolicy):
    """T_i = max_k z~_t with z~ the z-scored logits, shared by both models per token; the loss is T_i^2 D.

    Our reading: the paper says that T depends only on the teacher's maximum after standardisation; whether it takes it
    per sample or per batch we could not verify, and this takes it per token. On the logits themselves T_t = T_i std(z_t)
    = max z_t - mean z_t, and T_s = T_i std(z_s). The authors name language as a risk: they assume one strong peak, and
    the largest of 50k z-scores is above 4 even for normally distributed logits, which flattens the targets.
    No gradient flows into T.
    """

    name: ClassVar[str] = "max_logit"
    paper: ClassVar[str | None] = "arXiv 2503.09030"
    formula: ClassVar[str] = (
        "T_i = max_k (z_t - mean z_t) / std(z_t); T_t = T_i std(z_t), T_s = T_i std(z_s), factor T_i^2"
    )
    use: ClassVar[str] = (
        "To compare: our reading of a method made for image classes. Expect very high temperatures over a large "
        "vocabulary."
    )
    cost: ClassVar[str] = "4 passes per model (mean, centring, square, sum) and 2 more over the teacher's logits"
    state_fields: ClassVar[tuple[str, ...]] = ("mean",)

    def __init__(self) -> None:
        super().__init__()
        self.mean = 1.0

    @property
    def temperature(self) -> float:
        """The mean T_i of the last optimizer step (1 before the first)."""
        return self.mean

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        student_logits, teacher_logits = student_logits.detach(), teacher_logits.detach()
        deviation = standard_deviation(teacher_logits) + EPS
        peak = sharpness(teacher_logits)
        # A maximum is at least 1 / sqrt(V) deviations above the mean: the bound acts on constant rows alone.
        shared = (peak / deviation).clamp_(min=teacher_logits.shape[-1] ** -0.5)
        student = (standard_deviation(student_logits) + EPS) * shared
        return Temperatures(student, deviation * shared, scale=shared.square(), observed=shared)

    def end_step(self, stats: StepStats) -> None:
        if stats.observed and math.isfinite(stats.observed[0]) and stats.observed[0] > 0.0:
            self.mean = stats.observed[0]
