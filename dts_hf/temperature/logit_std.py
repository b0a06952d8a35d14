"""Logit standardisation (arXiv 2403.01427): each row's own standard deviation is a part of its temperature."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures, check_number
from dts_hf.temperature.spread import EPS, standard_deviation


class LogitStd(TemperaturePolicy):
    """T_s = value (std(z_s) + 1e-7), T_t = value (std(z_t) + 1e-7) per token; the loss is value^2 D.

    Dividing by the standard deviation over the vocabulary is the paper's z-score: softmax does not see the mean that it
    also subtracts. The factor is that of the base temperature, not T_s T_t. No gradient flows into the standard
    deviation; in the paper's code it does.

    Made for image classes, where a student should not have to copy its teacher's scale. The one published comparison
    on language models (AdaKD, arXiv 2510.11615, Table 5, reverse KL) finds it 2.3 ROUGE-L points worse than T = 1.

    Args:
        value: temperature of the standardised logits; 2 in the paper, which weights the soft loss 9 to 0.1.
    """

    name: ClassVar[str] = "logit_std"
    paper: ClassVar[str | None] = "arXiv 2403.01427"
    formula: ClassVar[str] = "T_s = value std(z_s), T_t = value std(z_t), factor value^2, per token"
    use: ClassVar[str] = (
        "The student is much smaller than the teacher and should learn the order of the words, not the scale of the "
        "logits. On language models it was reported harmful with reverse KL; run `constant` beside it."
    )
    cost: ClassVar[str] = "4 passes per model (mean, centring, square, sum)"

    def __init__(self, value: float = 2.0) -> None:
        super().__init__()
        self.value = check_number(self.name, "value", value, low=0.0, high=math.inf, low_open=True)

    @property
    def temperature(self) -> float:
        """The temperature of the standardised logits; on the logits themselves it is this times their deviation."""
        return self.value

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        student = (standard_deviation(student_logits.detach()) + EPS) * self.value
        teacher = (standard_deviation(teacher_logits.detach()) + EPS) * self.value
        scale = torch.full((), self.value**2, dtype=student.dtype, device=student.device)
        return Temperatures(student, teacher, scale=scale)
