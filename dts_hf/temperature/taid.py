"""TAID (arXiv 2501.16937): the target moves from a mix with the student's own distribution to the teacher's."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from dts_hf.registry import Between, PositiveFloat, Share
from dts_hf.temperature.base import (
    RowStats,
    StepStats,
    TemperaturePolicy,
    Temperatures,
    check_temperature,
    sigmoid,
)

#: The lowest relative change of the loss that counts: one tenfold of the last step's.
_LARGEST_RISE = -10.0


class TAID(TemperaturePolicy):
    """Target softmax((1 - t) z_s + t z_t), z_s held constant, with t rising from t_start to 1; T is fixed.

    The gap-adaptive scheduler of targets: it moves what the student aims at, not the temperature. After each optimizer
    step with distillation loss L, m = 0.99 m + 0.01 (L_prev - L) / (L_prev + 1e-15) and t grows by alpha sigmoid(m)
    (1 - t), at least up to the straight line t_start + (1 - t_start) progress: faster while the loss falls.

    In short runs the straight line is all there is. The adaptive step is alpha sigmoid(m), about alpha / 2, of what is left
    to 1; the line's is at least 1 / steps of it. So below 2 / alpha steps (4,000 at the paper's alpha) neither alpha nor m
    has an effect, and above that it is alpha that acts: over 20,000 steps of a falling loss the momentum moves t by less
    than 0.005 (tests/temperature/test_temperature_policies.py).

    L is the divergence that we train on; the released code feeds it the cross-entropy of the target and the student,
    which has the target's entropy in it and so never comes near 0. Ours does where the student starts as its teacher, and
    any later loss is then a relative change of millions: a rise counts as tenfold at most, so that m recovers. Our
    (1 - t) z_s + t z_t comes before the division by T.

    Args:
        t_start: the teacher's share at the start, above 0; 0.4 in the paper.
        alpha: largest step of t per optimizer step; 5e-4 in the paper. In short runs the straight line is faster.
        beta: memory of m; 0.99 in the paper.
        value: the temperature of teacher and student; 1 in the paper.
    """

    name = "taid"
    reads = "nothing"
    moves = False  # what does is the target
    paper = "arXiv 2501.16937"
    formula = (
        "target softmax((1 - t) z_s + t z_t), "
        "t <- max(t_start + (1 - t_start) progress, t + alpha sigmoid(m) (1 - t)); T = value"
    )
    use = (
        "The teacher is far stronger than the student. Compare with `constant` at the same value; whether the adaptive "
        "part acts at all shows a run with alpha 0 (the straight line)."
    )
    held = (
        "z_s in the target. Dropped is the force that would move the target to the student: it is there to be followed. As "
        "in its paper."
    )
    cost = "the mix of the logits: 2 passes"
    state_fields = ("share", "momentum", "last_loss")

    def __init__(
        self,
        t_start: Annotated[float, Between(0.0, 1.0, "high")] = 0.4,
        alpha: Share = 5e-4,
        beta: Share = 0.99,
        value: PositiveFloat = 1.0,
    ) -> None:
        super().__init__()
        self.t_start = self.checked("t_start", t_start)
        self.alpha = self.checked("alpha", alpha)
        self.beta = self.checked("beta", beta)
        self.value = check_temperature(self.name, "value", value)
        self.share = self.t_start
        self.momentum = 0.0
        self.last_loss: float | None = None

    @property
    def temperature(self) -> float:
        """``value``: what moves is the target, not the temperature."""
        return self.value

    def begin_step(self, progress: float) -> None:
        """Lift t to its straight line where it is below."""
        super().begin_step(progress)
        self.share = min(1.0, max(self.share, self.t_start + (1.0 - self.t_start) * self.progress))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give ``value`` and the teacher's share of the target, whatever the logits are.

        Args:
            student_logits: ``[C, V]``, for dtype and device alone.
            teacher_logits: ``[C, V]``, not read.
            rows: not read.

        Returns:
            One temperature for all rows and both models, and ``teacher_share``, each ``[]``.
        """
        value = torch.full((), self.value, dtype=student_logits.dtype, device=student_logits.device)
        return Temperatures(value, value, teacher_share=torch.full_like(value, self.share))

    def log_values(self) -> dict[str, float]:
        """The share t of the teacher, as ``teacher_share``: the temperature says nothing here."""
        return {"teacher_share": self.share}

    def end_step(self, stats: StepStats) -> None:
        """Move t by the relative change of the loss, smoothed; the first step has nothing to compare with."""
        loss, last = stats.kd, self.last_loss
        if not math.isfinite(loss):  # says nothing: t follows its straight line
            return
        self.last_loss = loss
        if last is None:
            return
        change = max((last - loss) / (last + 1e-15), _LARGEST_RISE)
        self.momentum = self.beta * self.momentum + (1.0 - self.beta) * change
        rate = sigmoid(self.momentum)
        self.share = min(1.0, self.share + self.alpha * rate * (1.0 - self.share))
