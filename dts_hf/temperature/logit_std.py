"""Logit standardisation (arXiv 2403.01427): each row's own standard deviation is a part of its temperature."""

from __future__ import annotations

import torch
from torch import Tensor

from dts_hf.registry import PositiveFloat
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures, check_temperature
from dts_hf.temperature.parts.logit_statistics import deviation_of


class LogitStd(TemperaturePolicy):
    """T_s = value std(z_s), T_t = value std(z_t) per token; the loss is value^2 D.

    Dividing by the standard deviation over the vocabulary is the paper's z-score: softmax does not see the mean that it
    also subtracts. The factor is that of the base temperature, not T_s T_t. The gradient flows through the student's
    standard deviation, as in the paper's code: the soft loss does not depend on the scale of the student's logits, and
    does not push it. (Up to version 0.1.0 the deviation was held constant, and a student could collapse.) A row with a
    deviation of 0.001 or less has none and is divided by ``value`` alone; the paper's code adds 1e-7 to the deviation,
    and its gradient at equal logits is non-finite.

    Made for image classes, where a student should not have to copy its teacher's scale. The one published comparison
    on language models (AdaKD, arXiv 2510.11615, Table 5, reverse KL) finds it 2.3 ROUGE-L points worse than T = 1.

    Args:
        value: temperature of the standardised logits; 2 in the paper, which weights the soft loss 9 to 0.1.
    """

    name = "logit_std"
    reads = "summary"
    any_text = True
    paper = "arXiv 2403.01427"
    formula = "T_s = value std(z_s), T_t = value std(z_t), factor value^2, per token"
    use = (
        "The student is much smaller than the teacher and should learn the order of the words, not the scale of the "
        "logits. On language models it was reported harmful with reverse KL; run `constant` beside it."
    )
    cost = (
        "4 passes per model (mean, centring, square, sum), and 7 for the gradient through the student's deviation; on a CPU "
        "4 and 2 % of the loss"
    )

    def __init__(self, value: PositiveFloat = 2.0) -> None:
        super().__init__()
        self.value = check_temperature(self.name, "value", value)

    @property
    def temperature(self) -> float:
        """The temperature of the standardised logits; on the logits themselves it is this times their deviation."""
        return self.value

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give each row its two temperatures, ``value`` times the deviations of its logits.

        Args:
            student_logits: ``[C, V]``.
            teacher_logits: ``[C, V]``.
            rows: not read.

        Returns:
            T_s and T_t, each ``[C, 1]``; ``scale``, value^2 ``[]``; ``scale_free`` ``[C, 1]``, the rows whose student
            has a deviation: there the loss takes the derivative through std(z_s) along.
        """
        student, has_deviation = deviation_of(student_logits)
        teacher, _ = deviation_of(teacher_logits)
        scale = torch.full((), self.value**2, dtype=student.dtype, device=student.device)
        return Temperatures(student * self.value, teacher * self.value, scale=scale, scale_free=has_deviation)
