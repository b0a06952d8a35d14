"""NormKD: the standard deviation of each model's logits times a common factor is its temperature."""

from __future__ import annotations

from torch import Tensor

from dts_hf.registry import PositiveFloat
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures, check_temperature
from dts_hf.temperature.parts.logit_statistics import deviation_of


class NormKD(TemperaturePolicy):
    """T_s = t_norm std(z_s), T_t = t_norm std(z_t) per token; the loss is T_t^2 D.

    The same temperatures as ``logit_std``, but the factor T_t^2 moves with the row: tokens on which the teacher's
    logits spread widely weigh more. The gradient flows through the student's standard deviation, as in that port: the
    soft loss does not depend on the scale of the student's logits, and does not push it. (Up to version 0.1.0 the
    deviation was held constant: a student of 135 M at kd_ratio 0.9 was near the uniform distribution after 40 steps.)
    A row with a deviation of 0.001 or less has none and is divided by ``t_norm`` alone.

    Args:
        t_norm: the common factor; 1.5 in the language-model port that comes with BiLD (arXiv 2406.13555), 2 for DKD.
    """

    name = "norm_kd"
    reads = "summary"
    any_text = True
    paper = "arXiv 2308.00520"
    formula = "T_s = t_norm std(z_s), T_t = t_norm std(z_t), factor T_t^2, per token"
    use = (
        "As `logit_std`, with wide-spread tokens weighted up. T_t^2 makes kd_loss large: look at its size beside "
        "ce_loss before you choose kd_ratio."
    )
    cost = (
        "4 passes per model (mean, centring, square, sum), and 7 for the gradient through the student's deviation; on a CPU "
        "4 and 2 % of the loss"
    )

    def __init__(self, t_norm: PositiveFloat = 1.5) -> None:
        super().__init__()
        self.t_norm = check_temperature(self.name, "t_norm", t_norm)

    @property
    def temperature(self) -> float:
        """t_norm; on the logits themselves the temperature is this times their standard deviation."""
        return self.t_norm

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give each row its two temperatures, ``t_norm`` times the deviations of its logits.

        Args:
            student_logits: ``[C, V]``.
            teacher_logits: ``[C, V]``.
            rows: not read.

        Returns:
            T_s and T_t, each ``[C, 1]``; ``scale``, T_t^2 ``[C, 1]``; ``scale_free`` ``[C, 1]``, the rows whose student
            has a deviation: there the loss takes the derivative through std(z_s) along.
        """
        student, has_deviation = deviation_of(student_logits)
        teacher = deviation_of(teacher_logits)[0] * self.t_norm
        return Temperatures(student * self.t_norm, teacher, scale=teacher.square(), scale_free=has_deviation)
