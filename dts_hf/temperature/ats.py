"""Asymmetric temperature scaling (ATS, arXiv 2210.04427): the teacher's target token at another T than the rest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dts_hf.registry import PositiveFloat
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures, check_choice, check_temperature
from dts_hf.temperature.parts.logit_statistics import sharpness

Target = Literal["label", "argmax"]
TARGETS: tuple[Target, ...] = ("label", "argmax")


class ATS(TemperaturePolicy):
    """p = softmax(c / tau), c = z_t - mean z_t, tau = tau_y at one token, else tau_rest; T_s = value, factor value^2.

    A large teacher is surer than a small one, and one T that softens its first choice flattens the differences between the
    other tokens as well. With tau_y above tau_rest its first choice is softened alone.

    Differences from the paper and its code:

    - The logits are centred first: with two temperatures raw logits are not blind to a shift, and those of a language model
      have an arbitrary one. The paper divides raw logits.
    - The paper's token is the true class. ``target: argmax`` takes the teacher's first choice, which needs no label.
    - The defaults are ours; its code searches tau_y 1 to 6 and tau_rest 1 to 5, with a student at T = 1.

    Unlike with ``constant``, a student that copies its teacher has no loss of 0 where tau_y is not tau_rest: it should come
    out less sure than its teacher. With tau_y = tau_rest this is ``constant`` with that ``teacher_value``, times value /
    tau_rest; with all three equal it is ``constant`` itself.

    In a step on text of the student's own whose labels are that text, ``target: label`` gives no token a temperature of its
    own: all of the teacher is at tau_rest.

    Args:
        tau_y: the teacher's temperature at the token.
        tau_rest: that of all others.
        value: the student's temperature.
        target: which token: ``label``, or ``argmax`` for the teacher's first choice.
    """

    name = "ats"
    reads = "logits"
    moves = False
    without_kernels = "gives one token of a row a temperature of its own"
    paper = "arXiv 2210.04427"
    formula = (
        "p = softmax((z_t - mean z_t) / tau), tau = tau_y at the label, else tau_rest; T_s = value, factor value^2"
    )
    use = (
        "A teacher much larger and surer than the student, whose ranking of the other tokens should stay sharp. Published "
        "for image classes. Compare with `constant` at the best shared T: a default T against a tuned pair shows nothing."
    )
    cost = "1 reading pass over the teacher's logits, and another softmax of them; on a GPU the PyTorch road"

    def __init__(
        self,
        tau_y: PositiveFloat = 2.0,
        tau_rest: PositiveFloat = 1.0,
        value: PositiveFloat = 1.0,
        target: Target = "label",
    ) -> None:
        super().__init__()
        self.tau_y = check_temperature(self.name, "tau_y", tau_y)
        self.tau_rest = check_temperature(self.name, "tau_rest", tau_rest)
        self.value = check_temperature(self.name, "value", value)
        self.target = check_choice("target", target, TARGETS)
        self.raises = "label" if self.target == "label" else "first_choice"
        self.any_text = self.target == "argmax"

    @property
    def temperature(self) -> float:
        """That of the student."""
        return self.value

    @property
    def highest(self) -> float:
        """The highest one of the three, whether one token has it or all others."""
        return max(self.value, self.tau_y, self.tau_rest)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give T_s and tau_rest, and by how much tau_y moves the token's logit.

        Args:
            student_logits: ``[C, V]``, for dtype and device alone.
            teacher_logits: ``[C, V]``.
            rows: cross-entropy and log-sum-exp of the teacher's rows, ``[C]``.

        Returns:
            T_s and T_t, each ``[]``; ``scale``, value^2 ``[]``; ``raised`` ``[C, 1]``, c (1 / tau_y - 1 / tau_rest).
        """
        student = super().forward(student_logits, teacher_logits, rows).student
        answer = Temperatures(student, torch.full_like(student, self.tau_rest), scale=student.square())
        if self.target == "label" and self.holding:
            return answer
        logits = teacher_logits.detach()
        if self.target == "argmax":
            centred = sharpness(logits)
        else:
            centred = (rows.teacher_lse - rows.teacher_ce).detach().unsqueeze(-1) - logits.mean(-1, keepdim=True)
        return answer._replace(raised=centred * (1.0 / self.tau_y - 1.0 / self.tau_rest))
