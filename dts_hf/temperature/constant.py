"""A fixed temperature, the baseline no method beats consistently (Unified Revisit, arXiv 2603.02430)."""

from __future__ import annotations

import torch
from torch import Tensor

from dts_hf.registry import PositiveFloat
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures, check_temperature


class Constant(TemperaturePolicy):
    """T = ``value`` for the whole run (Hinton et al. 2015, arXiv 1503.02531).

    With ``teacher_value`` the student's logits are divided by ``value`` and the teacher's by ``teacher_value``, and the
    factor is T_s T_t: the baseline of every policy that gives the two models their own temperatures, a question that DTS
    (arXiv 2511.13767) leaves open, and for which it has no plain run to compare with. Its minimum is no
    copy of the teacher: at T_s < T_t the student comes out flatter than the teacher at T = 1, at T_s > T_t sharper.

    Args:
        value: the temperature, above 0; that of the student where the teacher has its own.
        teacher_value: the teacher's temperature, above 0; ``value`` when left out.
    """

    name = "constant"
    reads = "nothing"
    any_text = True
    moves = False
    paper = "arXiv 1503.02531"
    formula = "T_s = value, T_t = teacher_value (or value)"
    use = (
        "Always: the baseline. Sweep 1, 2 and 4 before you believe in any other policy; with `teacher_value` before you "
        "believe in one that gives student and teacher different temperatures (`dtkd`, `cist`, `dts` with `decoupled`)."
    )
    cost = "none"

    def __init__(self, value: PositiveFloat = 2.0, teacher_value: PositiveFloat | None = None) -> None:
        super().__init__()
        self.value = check_temperature(self.name, "value", value)
        self.teacher_value = teacher_value
        if teacher_value is not None:
            self.teacher_value = check_temperature(self.name, "teacher_value", teacher_value)

    @property
    def temperature(self) -> float:
        """That of the student."""
        return self.value

    @property
    def highest(self) -> float:
        """The higher one of both."""
        return max(self.value, self.teacher_value or 0.0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give ``value`` and ``teacher_value``, whatever the logits are.

        Args:
            student_logits: ``[C, V]``, for dtype and device alone.
            teacher_logits: ``[C, V]``, not read.
            rows: not read.

        Returns:
            T_s and T_t for all rows, each ``[]``.
        """
        shared = super().forward(student_logits, teacher_logits, rows)
        if self.teacher_value is None:
            return shared
        return shared._replace(teacher=torch.full_like(shared.teacher, self.teacher_value))
