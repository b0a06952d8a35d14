"""Annealing-KD (arXiv 2104.07163): the teacher's logits grow to full size, then only the labels are left."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from dts_hf.registry import Between
from dts_hf.temperature.base import RowStats, TemperaturePolicy, Temperatures


class Annealing(TemperaturePolicy):
    """Phase 1: match Phi z_t with Phi = 1 - (T - 1) / t_max and T = t_max ... 1; phase 2: cross-entropy alone.

    Belongs to ``divergence: logit_mse``: the published phase 1 is the squared error of z_s and Phi z_t, without softmax
    and without a T^2 factor. Dividing the teacher's logits by 1 / Phi is the same thing, so the policy gives T_s = 1,
    T_t = 1 / Phi and the factor 1; ``temperature`` is 1 / Phi, from t_max down to 1. With another divergence it is a
    falling temperature for the teacher alone.

    It sets the kd_ratio of training, whatever the recipe says: 1 in phase 1, 0 in phase 2. (``eval_loss`` keeps the
    recipe's.)

    Args:
        t_max: T of the first stage, a whole number; 10 in the paper. Phase 1 has t_max equal stages.
        phase_share: share of the run that is phase 1; 10 of 13 epochs (0.769) in the paper.

    Raises:
        UserError: an option is out of range.
    """

    name = "annealing"
    reads = "nothing"
    any_text = True
    paper = "arXiv 2104.07163"
    formula = "T_s = 1, T_t = 1 / Phi, Phi = 1 - (T - 1) / t_max for T = t_max ... 1; then kd_ratio = 0"
    use = (
        "With `divergence: logit_mse`, for a teacher much larger than its student, and mostly for classification. "
        "Phase 2 needs good labels. Compare with `constant` at T = 1 and the same divergence."
    )
    cost = "none"

    def __init__(
        self,
        t_max: Annotated[int, Between(low=1)] = 10,
        phase_share: Annotated[float, Between(0.0, 1.0, "high")] = 0.77,
    ) -> None:
        super().__init__()
        self.t_max = self.checked_whole("t_max", t_max)
        self.phase_share = self.checked("phase_share", phase_share)

    @property
    def in_phase_one(self) -> bool:
        """Whether the teacher is followed; a share of 1 has no phase 2, also at progress 1."""
        return self.progress < self.phase_share or self.phase_share == 1.0

    @property
    def phi(self) -> float:
        """The factor of the teacher's logits, from 1 / t_max up to 1."""
        # Progress is step / steps in floating point: the first step of a stage may come out an ulp below its border.
        stage = math.floor(self.progress / self.phase_share * self.t_max + 1e-9)
        t = max(self.t_max - stage, 1)
        return 1.0 - (t - 1) / self.t_max

    @property
    def temperature(self) -> float:
        """1 / Phi, the temperature of the teacher; the student's is 1."""
        return 1.0 / self.phi

    @property
    def ends(self) -> tuple[float, ...]:
        """t_max and 1, of the teacher."""
        return float(self.t_max), 1.0

    @property
    def kd_ratio(self) -> float | None:
        """1 in phase 1, 0 in phase 2."""
        return 1.0 if self.in_phase_one else 0.0

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, rows: RowStats) -> Temperatures:
        """Give T_s = 1, T_t = 1 / Phi and the factor 1, whatever the logits are.

        Args:
            student_logits: ``[C, V]``, for dtype and device alone.
            teacher_logits: ``[C, V]``, not read.
            rows: not read.

        Returns:
            Two temperatures for all rows and ``scale``, each ``[]``.
        """
        one = torch.ones((), dtype=student_logits.dtype, device=student_logits.device)
        return Temperatures(one, one / self.phi, scale=one)
